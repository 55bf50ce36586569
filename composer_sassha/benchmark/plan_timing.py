"""The time of the steps that a prediction for several ranks begins with."""

import os
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import NamedTuple

import torch.distributed as torch_dist
from composer.utils import dist

from composer_sassha.benchmark.collectives import Collective, bucket_sizes, traffic
from composer_sassha.benchmark.prediction import average
from composer_sassha.benchmark.selection import naming
from composer_sassha.benchmark.steps import Kind, Stepper, Timing, median_timing, stepper_of
from composer_sassha.common.batches import unwrapped
from composer_sassha.recipes.config import Recipe


class TimedMethod(NamedTuple):
    """The median time of each kind of a method's steps, and the collectives of each.

    Args:
        timings: on one process.
        schedule: how often each kind occurs, from `schedule`.
        traffic: from `traffic`.
        gradient: its bytes.
    """

    timings: dict[Kind, Timing]
    schedule: Counter[Kind]
    traffic: dict[Kind, list[Collective]]
    gradient: int

    @property
    def step(self) -> float:
        """Return the seconds of a step, on average."""
        return average(self.schedule, lambda kind: self.timings[kind].step)


def time_methods(recipes: Mapping[str, Recipe], steps: int) -> dict[str, TimedMethod]:
    """Time the steps of every method in a Trainer; the methods take turns.

    Args:
        recipes: by method.
        steps: number of steps of each kind.
    """
    with ExitStack() as stack:
        steppers: dict[str, Stepper] = {}
        for method, recipe in recipes.items():
            with naming(method):
                steppers[method] = stepper_of(recipe, backward=True)
                stack.callback(steppers[method].close)
                steppers[method].warm_up()
        found: dict[str, dict[Kind, list[Timing]]] = {method: defaultdict(list) for method in steppers}
        for _ in range(steps):
            for method, stepper in steppers.items():
                for kind in stepper.schedule:
                    found[method][kind].append(stepper.take(kind))
        return {
            method: _timed_method(stepper, found[method], scaled=recipes[method].precision == "amp_fp16")
            for method, stepper in steppers.items()
        }


def _timed_method(stepper: Stepper, steps: Mapping[Kind, Sequence[Timing]], scaled: bool) -> TimedMethod:
    model = unwrapped(stepper.trainer.state.model)
    return TimedMethod(
        {kind: median_timing(timings) for kind, timings in steps.items()},
        stepper.schedule,
        {kind: traffic(stepper.optimizer, model, kind, scaled=scaled) for kind in stepper.schedule},
        sum(bucket_sizes(model)),
    )


def slowest_ranks(methods: Mapping[str, TimedMethod]) -> dict[str, TimedMethod]:
    """Take the medians of the rank where they are largest, as the others wait for it."""
    ranks = dist.all_gather_object({method: timed.timings for method, timed in methods.items()})
    return {
        method: timed._replace(
            timings={kind: max(rank[method][kind] for rank in ranks) for kind in timed.timings}
        )
        for method, timed in methods.items()
    }


@contextmanager
def as_single_process() -> Iterator[None]:
    """Hide the other ranks from Composer until the process group is there."""
    names = ("WORLD_SIZE", "LOCAL_WORLD_SIZE", "RANK", "NODE_RANK")  # LOCAL_RANK chooses the GPU
    if torch_dist.is_initialized():  # by a program that calls this one in a process of its own
        names = ()  # type: ignore[assignment]
    before = {name: os.environ.pop(name) for name in names if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(before)
