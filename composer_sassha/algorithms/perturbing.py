"""The base class of all algorithms that perturb."""

import copy
import functools
import inspect
import math
import warnings
from dataclasses import fields
from typing import Any

from composer.core import Algorithm, Event, State
from composer.loggers import Logger
from composer.utils import dist

from composer_sassha.algorithms import checks, wiring
from composer_sassha.algorithms.base import MethodAlgorithm
from composer_sassha.algorithms.given import CUTTABLE
from composer_sassha.common import validate
from composer_sassha.common.batches import must_divide
from composer_sassha.perturbations import Perturbation

# A set, because comparing Composer's events one by one is slow, and `match` runs on every event of a step.
_EVENTS = frozenset((*wiring.START, Event.BATCH_END))
LOGGED = ("rho", "grad_norm", "momentum_norm", "loss_gap", "dominant_eigenvalue", "skipped_steps")


class PerturbingAlgorithm(MethodAlgorithm):
    """Gives the Trainer's optimizer a perturbation, at BEFORE_LOAD, and logs its metrics.

    Args:
        perturbation: one of `composer_sassha.perturbations`.
        interval: steps between perturbed steps, >= 1.
        sync_ascent: average the gradient at w over the ranks; None for a method without an ascent.
        ascent_fraction: the fraction of each microbatch that gives the gradient at w, in (0, 1].
    """

    def __init__(
        self,
        perturbation: Perturbation,
        interval: int,
        sync_ascent: bool | None,
        ascent_fraction: float = 1.0,
    ) -> None:
        name = type(self).__name__
        self.perturbation: Perturbation = perturbation
        self.interval = validate.integer(name, "interval", interval, low=1)
        if sync_ascent is not None:
            validate.boolean(name, "sync_ascent", sync_ascent)
        self.sync_ascent = sync_ascent
        self.ascent_fraction = validate.fraction(name, "ascent_fraction", ascent_fraction)
        self._looked_for_sync = False
        self._first_batch = True  # of a call of fit()

    def settings(self) -> dict[str, Any]:
        """Return the arguments of the constructor, for `repr`."""
        shown = [f.name for f in fields(self.perturbation) if f.repr]  # type: ignore[arg-type]  # a dataclass
        own = {name: getattr(self.perturbation, name) for name in shown}
        sync = {} if self.sync_ascent is None else {"sync_ascent": self.sync_ascent}
        return {**own, "interval": self.interval, **sync}

    def __repr__(self) -> str:
        return as_call(self, self.settings())

    def match(self, event: Event, state: State) -> bool:
        """Whether to run: at the Trainer's start, before the forward of a partial ascent, and to log."""
        if self.ascent_fraction < 1 and event == Event.BEFORE_FORWARD:
            return wiring.phase(state) == "ascent"
        return event in _EVENTS

    def apply(self, event: Event, state: State, logger: Logger) -> None:
        """Wrap the optimizer, take a part of the batch, or log."""
        if event == Event.INIT:
            self._looked_for_sync = False  # this may be another Trainer
            checks.check(state)
        elif event == Event.BEFORE_LOAD:
            # A copy: a schedule may change it, while this algorithm may serve another Trainer too.
            optimizer = wiring.wrapped_optimizer(state)
            optimizer.set_perturbation(
                copy.copy(self.perturbation),
                self.interval,
                sync_ascent=bool(self.sync_ascent),
                partial_ascent=self.ascent_fraction < 1,
            )
            wiring.bring(optimizer, optimizer.perturbation)
        elif event == Event.FIT_START:
            wiring.refuse_another_trainers(state)
            self._first_batch = True
            wiring.scale_gradients(state)  # fit() may have been given another precision
            # A checkpoint may have brought other groups.
            self.perturbation.check(state.optimizers[0].base_optimizer)
        elif event == Event.BATCH_END:
            self._warn_if_synchronized(state)
            wiring.log(state, logger, "sharpness", LOGGED)
        elif event == Event.BEFORE_FORWARD:
            self._take_part(state)

    def _take_part(self, state: State) -> None:
        """Replace `state.batch` by the first samples of the microbatch, without writing into it."""
        samples = wiring.samples(state)
        size = samples.count(state.batch)
        # At least two: BatchNorm cannot normalize one sample by its own statistics.
        wanted = max(2, math.ceil(self.ascent_fraction * size))
        fraction = f"{type(self).__name__}: ascent_fraction={self.ascent_fraction}"
        what = f"{fraction} takes the first {wanted} samples of each microbatch"
        with must_divide(what, f"{CUTTABLE}, or set ascent_fraction=1"):
            state.batch = samples.first(state.batch, wanted, size)

    def _warn_if_synchronized(self, state: State) -> None:
        """Warn once if the ascent gradient is averaged although `sync_ascent` is off."""
        norm, first = state.optimizers[0].metrics.get("grad_norm"), self._first_batch
        self._first_batch = False
        # Only values that agree on all ranks may decide whether to enter the collective below.
        if (
            self.sync_ascent is not False
            or self._looked_for_sync
            or norm is None
            or dist.get_world_size() == 1
        ):
            return
        if state.auto_microbatching and first:
            return  # the Trainer synchronizes all passes of the first batch
        norms = dist.all_gather_object(float(norm))
        if not all(0 < norm < math.inf for norm in norms):
            return
        self._looked_for_sync = True
        if len(set(norms)) == 1 and dist.get_global_rank() == 0:
            warnings.warn(
                f"{type(self).__name__}: all ranks perturb along the same gradient, as with "
                "sync_ascent=True: every gradient is averaged (by FSDP, ddp_sync_strategy='forced_sync', or "
                "DDP when it looks for unused parameters); sync_ascent=True says that this is meant",
                stacklevel=2,
            )


def as_call(algorithm: Algorithm, settings: dict[str, Any]) -> str:
    """Return the call that makes an algorithm, as text."""
    order = _parameters(type(algorithm))
    arguments = [f"{name}={_literal(settings[name])}" for name in order if name in settings]
    return f"{type(algorithm).__name__}({', '.join(arguments)})"


@functools.cache  # the Trainer takes the repr of an algorithm whenever it runs, on every step
def _parameters(algorithm: type) -> tuple[str, ...]:
    return tuple(inspect.signature(algorithm).parameters)


def _literal(value: Any) -> str:
    return "float('inf')" if value == math.inf else repr(value)
