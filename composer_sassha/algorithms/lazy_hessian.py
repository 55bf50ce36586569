"""The lazy Hessian refresh through the Trainer's events."""

from collections.abc import Mapping
from typing import Any

from composer.core import Algorithm, Event, State
from composer.loggers import Logger
from composer.utils import ensure_tuple
from torch import Tensor

from composer_sassha.algorithms import _checks, _trainer
from composer_sassha.curvature import LazyCurvature


class LazyHessian(Algorithm):
    """Estimates the Hessian's diagonal every `interval` steps, for the optimizer (SASSHA, arXiv 2502.18153).

    The estimate is taken on the pass whose gradient updates the weights: at w + e on a perturbed step.
    Between BEFORE_BACKWARD and the backward itself, the loss is differentiated twice and replaced by a
    stand-in whose backward delivers the gradient found, so that no other pass builds a second-order graph.
    Microbatches count with the Trainer's own weights, ranks are averaged in one collective.

    Logs, on refresh steps, `hessian/mean_abs`, `hessian/negative_fraction` and `hessian/refreshes`, and on
    steps that were skipped their number so far, `hessian/skipped_steps`.

    Args:
        interval: steps between refreshes, >= 1. Default: 10.
        estimator: its name; allowed: 'hutchinson'.
        samples: probes per microbatch, >= 1. Default: 1.
        seed: of the probes, >= 0. Default: 0.

    Raises:
        TypeError, ValueError: an argument that is not allowed; at the Trainer's start, a combination that is
            not.

    Example:
        >>> LazyHessian(interval=5)
        LazyHessian(interval=5, estimator='hutchinson', samples=1, seed=0)
    """

    def __init__(
        self, interval: int = 10, estimator: str = "hutchinson", samples: int = 1, seed: int = 0
    ) -> None:
        self.curvature = LazyCurvature(interval, estimator, samples, seed)

    def __repr__(self) -> str:
        return repr(self.curvature).replace("LazyCurvature", "LazyHessian")

    def match(self, event: Event, state: State) -> bool:
        """Run at the Trainer's start, on passes that estimate, and at the end of each batch to log."""
        if event == Event.BEFORE_BACKWARD:
            return self.curvature.active
        return event in (*_trainer.START, Event.BATCH_END)

    def apply(self, event: Event, state: State, logger: Logger) -> None:
        """Wrap the optimizer, estimate, or log."""
        if event == Event.INIT:
            _checks.check(state)
            self._run_last(state)
        elif event == Event.BEFORE_LOAD:
            _trainer.wrapped_optimizer(state).set_curvature(self.curvature)
        elif event == Event.FIT_START:
            _checks.check_precision(state)
            self._run_last(state)  # loading may have added algorithms
        elif event == Event.BEFORE_BACKWARD:
            state.loss = _with_total(state.loss, self.curvature.attach)
        else:
            _trainer.log(
                state, logger, "hessian", ("mean_abs", "negative_fraction", "refreshes", "skipped_steps")
            )

    def _run_last(self, state: State) -> None:
        # Others change the loss on BEFORE_BACKWARD (MixUp, CutMix); the Hessian is that of the loss that they
        # leave.
        state.algorithms = sorted(state.algorithms, key=lambda algorithm: self in _checks.parts([algorithm]))


def _with_total(loss: Any, attach: Any) -> Any:
    """Put the stand-in of the total loss where the Trainer will find it, its parts detached beside it."""
    if isinstance(loss, Mapping) and "total" in loss:
        return {**{name: part.detach() for name, part in loss.items()}, "total": attach(loss["total"])}
    parts = list(loss.values()) if isinstance(loss, Mapping) else list(ensure_tuple(loss))
    means = [part.mean() for part in parts]
    total = attach(sum(means[1:], start=means[0]))
    if isinstance(loss, Tensor):
        return total
    # The Trainer adds up the means, and logs each: keep their values, and give the total's gradient to the
    # first.
    values = [mean.detach() for mean in means]
    values[0] = values[0] + (total - total.detach())
    return dict(zip(loss, values, strict=True)) if isinstance(loss, Mapping) else tuple(values)
