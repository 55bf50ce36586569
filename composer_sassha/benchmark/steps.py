"""Time single steps of a Trainer, each of a given kind."""

import math
import time
import warnings
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from statistics import median
from typing import Any, NamedTuple

import torch
from composer import Algorithm, Callback, State, Trainer
from composer.models import ComposerModel
from torch.optim import Optimizer

from composer_sassha.common.batches import size_of
from composer_sassha.recipes.build import build_parts
from composer_sassha.recipes.config import Recipe


class Kind(NamedTuple):
    """What a step does in addition to its update: perturb the weights, refresh the Hessian."""

    perturbs: bool = False
    refreshes: bool = False


class Timing(NamedTuple):
    """Seconds of a step, from its data being there to its end.

    Args:
        step: wall time.
        cpu: processor time of this process, which other programs hardly lengthen.
        backward: wall time of the last backward pass; 0 where the `Stepper` does not time it.
    """

    step: float
    cpu: float = 0.0
    backward: float = 0.0


def is_wrapped(optimizer: Optimizer) -> bool:
    """Return whether it is a `SharpnessAwareOptimizer`, as in all our methods."""
    return hasattr(optimizer, "base_optimizer")


def kinds(optimizer: Optimizer) -> list[Kind]:
    """Return the kind of every step in one period of a method's intervals.

    Args:
        optimizer: the Trainer's, a `SharpnessAwareOptimizer` or any other.

    >>> from composer_sassha import SharpnessAwareOptimizer
    >>> from composer_sassha.perturbations import SAMPerturbation
    >>> sgd = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
    >>> [kind.perturbs for kind in kinds(SharpnessAwareOptimizer(sgd, SAMPerturbation(), interval=3))]
    [True, False, False]
    """
    perturbation, curvature = (getattr(optimizer, name, None) for name in ("perturbation", "curvature"))
    perturbs = 0 if perturbation is None else optimizer.interval  # type: ignore[attr-defined]
    refreshes = 0 if curvature is None else curvature.interval
    return [
        Kind(*(bool(interval) and step % interval == 0 for interval in (perturbs, refreshes)))
        for step in range(math.lcm(perturbs or 1, refreshes or 1))
    ]


def schedule(optimizer: Optimizer) -> Counter[Kind]:
    """Count the kinds of steps in one period, those that do most first.

    Args:
        optimizer: as for `kinds`.
    """
    found = kinds(optimizer)
    return Counter({kind: found.count(kind) for kind in sorted(set(found), reverse=True)})


class Stepper:
    """A Trainer that takes one step at a time, always on the same batch, and times it.

    The learning rate is 0, so that nothing diverges. Neither changes the time of a step. Every step is a
    call of `fit()`, whose start and end do not count.

    Args:
        recipe: gives precision, size of the microbatches and seed.
        model: the model.
        batch: the batch of every step.
        optimizer: the optimizer.
        algorithms: Composer algorithms.
        device: the Trainer's, such as "cpu"; None takes a GPU if there is one.
        backward: whether to time the backward pass too, for which a GPU has to wait.
    """

    def __init__(
        self,
        recipe: Recipe,
        model: ComposerModel,
        batch: Any,
        optimizer: Optimizer,
        algorithms: Sequence[Algorithm] = (),
        *,
        device: str | None = None,
        backward: bool = False,
    ) -> None:
        for group in optimizer.param_groups:
            group["lr"] = 0.0
        self.batch, self._watch = batch, _Stopwatch(backward)
        self.trainer = Trainer(
            model=model,
            train_dataloader=[batch],
            optimizers=optimizer,
            algorithms=list(algorithms),
            callbacks=[self._watch],
            max_duration="1ba",
            precision=recipe.precision,
            device=device,
            device_train_microbatch_size=recipe.device_train_microbatch_size or size_of(batch),
            seed=recipe.seed,
            deterministic_mode=recipe.deterministic,
            progress_bar=False,
        )
        self.optimizer: Any = self.trainer.state.optimizers[0]  # as the algorithms have wrapped it
        self.schedule = schedule(self.optimizer)

    def take(self, kind: Kind) -> Timing:
        """Take a step of one kind and return its time.

        Args:
            kind: one of the `schedule`. If some refresh, the first step must be one of those.
        """
        self.prepare(kind)
        self.trainer.fit(duration="1ba")
        return self._watch.found

    def prepare(self, kind: Kind) -> None:
        """Set the counters of the optimizer that decide on the kind of the next step.

        Args:
            kind: one of the `schedule`.
        """
        if is_wrapped(self.optimizer):
            step = kinds(self.optimizer).index(kind)
            for group in self.optimizer.param_groups:
                group.update(steps_taken=step, last_refresh=step - 1)

    def warm_up(self) -> None:
        """Take steps of all kinds, so that state is allocated, kernels are chosen and there is a Hessian."""
        for kind in 2 * [*self.schedule]:
            self.take(kind)

    def close(self) -> None:
        """Close the Trainer."""
        self.trainer.close()


def stepper_of(recipe: Recipe, *, device: str | None = None, backward: bool = False) -> Stepper:
    """Build the Trainer of a recipe's method, on the first batch of its data.

    Args:
        recipe: with the method. Learning-rate schedules are left out, as they cost nothing.
        device: see `Stepper`.
        backward: see `Stepper`.

    Raises:
        ConfigError, ValueError: the recipe cannot be built.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Cannot split tensor of length")  # a batch may be small
        # The schedules may refuse so short a training.
        parts = build_parts(replace(recipe, schedulers=None, schedules={}))
    batch = next(iter(parts.train))
    return Stepper(
        recipe, parts.model, batch, parts.optimizer, parts.algorithms, device=device, backward=backward
    )


class _Stopwatch(Callback):
    """Time a step by the Trainer's events."""

    def __init__(self, backward: bool) -> None:
        self.found = Timing(0.0)
        self._backward = backward
        self._start = self._cpu = self._before = self._took = 0.0

    def run_event(self, event: Any, state: State, logger: Any) -> None:
        name = event.value
        passes = name in ("before_backward", "after_backward") and self._backward
        if name not in ("batch_start", "batch_end") and not passes:
            return
        if state.device.name == "gpu":
            torch.cuda.synchronize()
        now, cpu = time.perf_counter(), time.process_time()
        if name == "batch_start":
            self._start, self._cpu = now, cpu
        elif name == "before_backward":
            self._before = now
        elif name == "after_backward":
            self._took = now - self._before
        else:
            self.found = Timing(now - self._start, cpu - self._cpu, self._took)


def median_timing(timings: Iterable[Timing]) -> Timing:
    """Return the median of each time.

    >>> median_timing([Timing(1.0), Timing(4.0), Timing(2.0)]).step
    2.0
    """
    return Timing(*map(median, zip(*timings, strict=True)))
