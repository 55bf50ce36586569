"""Counts the collectives that a Trainer really issues. `main` does so for every case on each of two ranks.

    with CountedCollectives() as counted:
        trainer.fit()
    counted.issued  # [Issued(operation='allreduce_', size=8), ...]

A case's result is a file: per step, its kind, what was issued, and what `benchmark.collectives.traffic` says.
"""

import json
import traceback
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from composer import Trainer
from composer.core import Event, Precision, State
from composer.models import ComposerClassifier
from composer.utils import dist
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from composer_sassha import GSAM, SAM, USAM, LookSAM, Sassha
from composer_sassha.benchmark.collectives import traffic
from composer_sassha.benchmark.steps import Kind
from composer_sassha.recipes.build import build_parts
from composer_sassha.recipes.config import load_recipe
from tests.distributed.launch import without_metrics
from tests.helpers import Spy, digits, digits_network, float16_on_cpu, trainer
from tests.methods import METHODS, MORE, NAMED, Method, sassha, sgd

# Which argument holds what a rank hands in.
_OPERANDS = {"allreduce_": 0, "broadcast_": 0, "allgather_": 1}


class Issued(NamedTuple):
    """A collective by its name in torch's c10d, and the bytes that this rank has handed in."""

    operation: str
    size: int


class CountedCollectives(TorchDispatchMode):
    """Within it, every collective of this process is noted, those of DDP's reducer among them."""

    def __init__(self) -> None:
        super().__init__()
        self.issued: list[Issued] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            name = func._opname
            tensors = [] if name == "barrier" else tree_leaves(args[_OPERANDS[name]])
            self.issued.append(Issued(name, sum(t.nbytes for t in tensors)))
        return func(*args, **(kwargs or {}))


class CountedStep(NamedTuple):
    """A step's kind, the collectives between its data being there and its end, and those predicted."""

    kind: Kind
    issued: list[Issued]
    predicted: list[tuple[str, int]]


def counted_steps(build: Callable[..., Trainer], steps: int) -> list[CountedStep]:
    """Train, and count step by step.

    Args:
        build: makes the Trainer; takes its further arguments.
        steps: their number.
    """
    counted, found, begun = CountedCollectives(), [], (Kind(), 0)

    def look(event: Event, state: State, passes: int) -> None:
        nonlocal begun
        (optimizer,) = state.optimizers
        if event == Event.BATCH_START:
            wrapped = hasattr(optimizer, "base_optimizer")
            kind = Kind(optimizer.ascent_due(), optimizer.refresh_due()) if wrapped else Kind()
            begun = kind, len(counted.issued)
        elif event == Event.BATCH_END:
            kind, before = begun
            model = state.model.module
            scaled = state.precision == Precision.AMP_FP16
            predicted = [(c.purpose, c.size) for c in traffic(optimizer, model, kind, scaled=scaled)]
            found.append(CountedStep(kind, counted.issued[before:], predicted))

    run = build(callbacks=[Spy(look)], max_duration=f"{steps}ba")
    if run.state.precision == Precision.AMP_FP16:  # the scale that it starts from overflows
        run.state.scaler.load_state_dict({**run.state.scaler.state_dict(), "scale": 2.0**7})
    with counted:
        run.fit()
    run.close()
    return found


def _small(method: Method, **settings: Any) -> list[CountedStep]:
    """Seven steps of a small network on the digits, in microbatches."""

    def build(**kwargs: Any) -> Trainer:
        model = without_metrics(settings.get("model") or digits_network())
        return trainer(
            method.optimizer,
            method.algorithms(),
            **{"dataset": digits(), "device_train_microbatch_size": 7, **settings, **kwargs, "model": model},
        )

    return counted_steps(build, steps=7)


def _several_buckets() -> ComposerClassifier:
    """Gradients of 3.4 MB, which DDP sends in several pieces."""
    layers = [nn.Flatten(), nn.Linear(64, 400), nn.Tanh(), nn.Linear(400, 400), nn.Tanh()]
    layers += [nn.Linear(400, 1500), nn.Tanh(), nn.Linear(1500, 10)]
    return ComposerClassifier(nn.Sequential(*layers), num_classes=10)


def _of_the_recipe(method: str) -> list[CountedStep]:
    """A method of the digits recipe, over its longest interval of ten steps, once the buckets are sorted."""
    parts = build_parts(load_recipe("digits", [f"method={method}", "data.batch_size=20"]))

    def build(**kwargs: Any) -> Trainer:
        return trainer(
            lambda _: parts.optimizer,
            parts.algorithms,
            model=without_metrics(parts.model),
            dataset=digits(),
            **kwargs,
        )

    return counted_steps(build, steps=13)


def _in_half(method: Method) -> list[CountedStep]:
    with float16_on_cpu() as settings:
        return _small(method, **settings)


PLAIN = Method("plain_sgd", sgd, list)
SYNCED = [
    Method("sam_synced", sgd, lambda: [SAM(0.1, sync_ascent=True)]),
    Method("gsam_synced", sgd, lambda: [GSAM(0.1, sync_ascent=True)]),
    Method("usam_synced", sgd, lambda: [USAM(0.1, renormalize=True, sync_ascent=True)]),
    Method("looksam_synced", sgd, lambda: [LookSAM(0.1, interval=2, sync_ascent=True)]),
    Method("sassha_synced", sassha, lambda: [Sassha(0.1, hessian_interval=3, sync_ascent=True)]),
]
# What moves does not depend on the rule, once it takes curvature.
_FOUND = [m for m in METHODS if m in MORE or m.name.endswith("_sgd") or m.name.startswith("none_")]
_NAMED = {
    method.name: method for method in (PLAIN, *SYNCED, *_FOUND, NAMED["gsam_sassha"], NAMED["looksam_sophia"])
}
RECIPE = ("sgd", "sam", "sassha", "msassha")
HALF = ("sam_sgd", "looksam_sgd", "sassha")
WIDE = ("plain_sgd", "sam_sgd", "gsam_sgd", "sam_synced", "sassha")
CASES: dict[str, Callable[[], list[CountedStep]]] = {
    **{name: lambda method=method: _small(method) for name, method in _NAMED.items()},
    **{f"several_buckets[{n}]": lambda n=n: _small(_NAMED[n], model=_several_buckets()) for n in WIDE},
    **{f"half[{name}]": lambda name=name: _in_half(_NAMED[name]) for name in HALF},
    **{f"recipe[{name}]": lambda name=name: _of_the_recipe(name) for name in RECIPE},
}


def main(out: Path, names: Sequence[str]) -> None:
    """Run the named cases."""
    warnings.simplefilter("ignore")
    for name, case in CASES.items():
        if name not in names:
            continue
        try:
            result = json.dumps(case())
        except Exception:
            result = traceback.format_exc()
        (out / f"{name}.rank{dist.get_global_rank()}").write_text(result)
        if result[0] != "[":
            break  # the other rank may be waiting in a collective that this one has left: end both
