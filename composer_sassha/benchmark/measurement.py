"""Measure the methods of a recipe on this machine: time, memory, the update, the work of a GPU."""

import platform
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from typing import Any

import composer
import torch
from composer.utils import get_device

from composer_sassha.benchmark.device import launches
from composer_sassha.benchmark.floor import Floor, Raw, has_floor
from composer_sassha.benchmark.memory import peaks
from composer_sassha.benchmark.selection import batch_size, naming, with_batch_size
from composer_sassha.benchmark.speed import Contestant, MedianInterval, Times, median_interval, race, ratio
from composer_sassha.benchmark.steps import Kind, Stepper, Timing, stepper_of
from composer_sassha.benchmark.update import Update, copies
from composer_sassha.recipes.components import OPTIMIZERS
from composer_sassha.recipes.config import Recipe
from composer_sassha.recipes.errors import ConfigError

MICROBATCHES = 4  # of a refresh whose memory is compared with that of one
_FLOOR, _RAW = " floor", " raw"  # what follows a method's name, in which there is no blank


def measure_methods(recipes: Mapping[str, Recipe], rounds: int, device: str | None = None) -> dict[str, Any]:
    """Measure every method, plain SGD and plain AdamW.

    Args:
        recipes: by method; all with the same model and data.
        rounds: steps of every kind that each method takes.
        device: "cpu" or "gpu"; None: the best there is.

    Returns:
        The content of `bench.json`: the setting, and the results of every method; None where there is nothing
        to measure.

    Raises:
        ConfigError: something cannot be built, or there is no such device.
    """
    first = next(iter(recipes.values()))
    device = device or get_device(None).name
    if device == "gpu" and not torch.cuda.is_available():
        raise ConfigError("--device=gpu: this machine has none that PyTorch finds; leave it out, or take cpu")
    if first.cpu_threads is not None:
        torch.set_num_threads(first.cpu_threads)
    threads = torch.get_num_threads()
    # What other programs do lengthens every step on the clock, but not the processor's own time for it.
    use_cpu_time = device == "cpu" and threads == 1
    clock = _cpu if use_cpu_time else _wall
    everyone = {**_references(recipes, first), **recipes}

    times, counts, parameters = _steps(everyone, rounds, clock, device)
    updates = _updates(everyone, rounds, clock, device)
    memory = {method: _memory(method, recipe, device) for method, recipe in everyone.items()}
    methods = {
        method: {
            **_speed(method, times),
            "update_over_adamw": _as_json(updates[method].over(updates["adamw"])),
            "launches": counts.get(method),
            **_compared(memory[method], memory["adamw"], parameters),
        }
        for method in everyone
    }
    return {
        "recipe": first.name,
        "model": {"name": type(first.model).__name__, **asdict(first.model)},
        "parameters": parameters,
        "batch_size": batch_size(first),
        "microbatch_size": first.device_train_microbatch_size,
        "precision": first.precision,
        "device": device,
        "device_name": torch.cuda.get_device_name() if device == "gpu" else platform.machine(),
        "threads": threads,
        "clock": "processor" if use_cpu_time else "wall",
        "rounds": rounds,
        "versions": {"torch": torch.__version__, "composer": composer.__version__},
        "methods": methods,
    }


def _references(recipes: Mapping[str, Recipe], first: Recipe) -> dict[str, Recipe]:
    """Return plain SGD and AdamW, which every method is compared with."""
    for name in ("sgd", "adamw"):
        if name in recipes and recipes[name].algorithms:
            raise ConfigError(
                f"methods.{name}: is what others are compared with, so it takes no algorithms; rename it"
            )
    return {
        name: replace(first, method=name, optimizer=OPTIMIZERS[name](), algorithms={}, schedules={})
        for name in ("sgd", "adamw")
    }


def _wall(timing: Timing) -> float:
    return timing.step


def _cpu(timing: Timing) -> float:
    return timing.cpu


def _steps(
    recipes: Mapping[str, Recipe], rounds: int, clock: Callable[[Timing], float], device: str
) -> tuple[dict[str, Times], dict[str, Any], int]:
    """Time the methods and their floors; on a GPU, count kernels and waits too."""
    contestants: dict[str, Contestant] = {}
    counts = {}
    with ExitStack() as stack:
        for method, recipe in recipes.items():
            with naming(method):
                stepper = stepper_of(recipe, device=device)
                stack.callback(stepper.close)
                stepper.warm_up()
            contestants[method] = stepper
            if method in ("sgd", "adamw") or not has_floor(stepper):
                continue
            floor, raw = Floor(recipe, stepper, device), Raw(stepper)
            stack.callback(floor.close)
            for name, contestant in ((_FLOOR, floor), (_RAW, raw)):
                for kind in 2 * [*contestant.schedule]:
                    contestant.take(kind)
                contestants[method + name] = contestant
        times = race(contestants, rounds, clock)
        steppers = {method: contestants[method] for method in recipes}
        if device == "gpu":
            counts = {
                method: {_kind_name(kind): launches(stepper, kind)._asdict() for kind in stepper.schedule}
                for method, stepper in steppers.items()
                if isinstance(stepper, Stepper)
            }
        model = next(iter(steppers.values())).trainer.state.model  # type: ignore[attr-defined]
        return times, counts, sum(p.numel() for p in model.parameters() if p.requires_grad)


def _updates(
    recipes: Mapping[str, Recipe], rounds: int, clock: Callable[[Timing], float], device: str
) -> dict[str, Times]:
    params = [*next(iter(recipes.values())).model.build().parameters()]
    where = "cuda" if device == "gpu" else "cpu"
    contestants = {}
    for method, recipe in recipes.items():
        optimizer = recipe.optimizer.build(copies(params, where))
        for group in optimizer.param_groups:
            group["foreach"] = True  # on a CPU torch takes one tensor after the other by itself
        contestants[method] = Update(optimizer)
    return race(contestants, 5 * rounds, clock)


def _memory(method: str, recipe: Recipe, device: str) -> dict[str, Any]:
    """Return the peak of each kind of step, and the ratio of a refresh in microbatches to one of them."""
    with naming(method):
        found, whole = peaks(recipe, device)
        refresh = next((kind for kind in found if kind.refreshes), None)
        ratio, size = None, batch_size(recipe)
        # A part of the batch is not the same part of one microbatch and of several.
        if refresh is not None and whole and size % MICROBATCHES == 0:
            samples = size // MICROBATCHES
            in_many = replace(recipe, device_train_microbatch_size=samples)
            many, _ = peaks(in_many, device)
            one, _ = peaks(with_batch_size(in_many, samples), device)
            ratio = many[refresh] / one[refresh]
    return {
        "ordinary": max((peak for kind, peak in found.items() if not kind.refreshes), default=None),
        "refresh": max((peak for kind, peak in found.items() if kind.refreshes), default=None),
        "microbatches_over_one": ratio,
    }


def _speed(method: str, times: Mapping[str, Times]) -> dict[str, Any]:
    own, floor, raw = times[method], times.get(method + _FLOOR), times.get(method + _RAW)
    return {
        "milliseconds": _milliseconds(own.steps),
        "kinds": [
            {
                "kind": _kind_name(kind),
                "share": count / own.schedule.total(),
                "milliseconds": _milliseconds(own.kinds[kind]),
                "over_floor": floor and _as_json(ratio(own.kinds[kind], floor.kinds[kind])),
            }
            for kind, count in own.schedule.items()
        ],
        "over_sgd": _as_json(own.over(times["sgd"])),
        "floor_milliseconds": floor and _milliseconds(floor.steps),
        "over_floor": floor and _as_json(own.over(floor)),
        "raw_milliseconds": raw and _milliseconds(raw.steps),
        "floor_over_raw": floor and raw and _as_json(floor.over(raw)),
    }


def _compared(memory: dict[str, Any], adamw: dict[str, Any], parameters: int) -> dict[str, Any]:
    """Return the memory, and how much more than AdamW's it is in copies of the parameters."""
    beyond = memory["ordinary"] and (memory["ordinary"] - adamw["ordinary"]) / (4 * parameters)
    return {"memory": memory, "copies_beyond_adamw": beyond}


def _milliseconds(seconds: Sequence[float]) -> dict[str, Any]:
    return _as_json(median_interval([1e3 * t for t in seconds]))


def _as_json(found: MedianInterval) -> dict[str, Any]:
    return {**asdict(found), "vague": found.vague}


def _kind_name(kind: Kind) -> str:
    """Return the name of a kind of step.

    >>> _kind_name(Kind(perturbs=True))
    'perturbs'
    """
    return " and ".join(name for name, does in kind._asdict().items() if does) or "plain"
