"""When the Hessian is refreshed, and what becomes of the step if the estimate is not finite."""

import contextlib
import warnings
from enum import Enum, auto
from typing import Any

import torch
from torch.amp.grad_scaler import GradScaler

from composer_sassha.curvature import Estimation, LazyCurvature, differentiable_twice
from composer_sassha.curvature.hooks import silenceable
from composer_sassha.optim.counters import Counters
from composer_sassha.optim.parameters import ParameterView

# The Hessian's scale is doubled after this many refreshes without an overflow; each overflow halves it.
HESSIAN_SCALE_GROWTH = 100
HESSIAN_SCALE_MAX = 2.0**15

# Abort after this many failed refreshes before the first success; each one skips its step.
FAILURES_ALLOWED = 10

# Warn where a step divides more than this fraction of its entries by eps alone. Reading it would make a
# device wait, so that there the first refresh is looked at, and then one of this many.
ZEROS_ALLOWED = 0.1
LOOK_EVERY = 100


class Outcome(Enum):
    """What a step does with the Hessian."""

    APPLIED = auto()  # a fresh estimate, or none was due
    KEPT = auto()  # the refresh failed: the step goes on with the old estimate
    SKIPPED = auto()  # the refresh failed and there is no estimate yet: the step is skipped


class RefreshPolicy:
    """Begins a due refresh, judges its result and hands it to the update rule.

    Args:
        counters: of the optimizer.
    """

    def __init__(self, counters: Counters) -> None:
        self.counters = counters
        self.curvature: LazyCurvature | None = None
        self.estimation: Estimation | None = None  # of the running pass
        self.failed = 0  # since this process began
        self._looked = False  # for what the estimator cannot work with
        self._failed_in_a_row = 0
        self._warned_of_zeros = False

    def set_curvature(self, curvature: LazyCurvature | None) -> None:
        """Choose how the diagonal is estimated, and how often; None: never."""
        self.curvature, self._looked = curvature, False

    @property
    def due(self) -> bool:
        """Whether the coming (or running) step refreshes the Hessian."""
        return self.curvature is not None and self.curvature.due(
            self.counters["steps_taken"], self.counters["last_refresh"]
        )

    def differentiable(self, scaler: GradScaler | None) -> contextlib.ExitStack:
        """Run all passes of a refresh step as the estimator needs them: else dropout draws other masks."""
        stack = contextlib.ExitStack()
        if self.curvature is not None and self.due:
            stack.enter_context(silenceable())
            if self.curvature.needs.second_order:
                stack.enter_context(differentiable_twice(float16=scaler is not None))
            if self.curvature.needs.eager:
                stack.enter_context(torch.compiler.set_stance("force_eager"))
        return stack

    def begin(self, view: ParameterView, scaler: GradScaler | None) -> None:
        """Estimate in the coming pass if a refresh is due."""
        if self.curvature is None or not self.due:
            return
        self.estimation = Estimation(
            self.curvature,
            view.trainable,
            self.counters["steps_taken"],
            gradient_scale=1.0 if scaler is None else scaler.get_scale(),
            scale=self._scale(scaler),
            model=view.model,
            look=not self._looked,
            ranks=view.ranks,
        )

    def finish(self, rule: Any, scaler: GradScaler | None, metrics: dict[str, Any]) -> Outcome:
        """Hand a refreshed diagonal to the update rule.

        Args:
            rule: the base optimizer, with `update_curvature`.
            scaler: of the running step.
            metrics: where to log.

        Raises:
            RuntimeError: no refresh succeeded in the first `FAILURES_ALLOWED` steps.
        """
        if self.estimation is None:
            return Outcome.APPLIED
        refreshes = self.counters["refreshes"]
        diagonal, found = self.estimation.finish()
        self.end()  # the base optimizer may need its memory
        if diagonal is None:
            self.failed += 1
            metrics["failed_refreshes"] = self.failed
            self._back_off(scaler, refreshes)
            if not refreshes:
                return Outcome.SKIPPED
            self._look_for_zeros(rule, metrics)
            return Outcome.KEPT
        self._failed_in_a_row = 0
        if scaler is not None:
            self._grow(scaler)
        rule.update_curvature(diagonal)
        self.counters.update(last_refresh=self.counters["steps_taken"], refreshes=refreshes + 1)
        metrics.update(found, refreshes=refreshes + 1)
        self._look_for_zeros(rule, metrics)
        return Outcome.APPLIED

    def end(self) -> None:
        """Forget the running estimate, however the step ended."""
        if self.estimation is not None:
            self._looked |= self.estimation.looked
            self.estimation.forget()
            self.estimation = None

    def _look_for_zeros(self, rule: Any, metrics: dict[str, Any]) -> None:
        """Log the fraction of the step that is divided by eps alone, and warn once if it is large."""
        if not hasattr(rule, "zero_fraction"):
            return
        zeros = metrics["zero_fraction"] = rule.zero_fraction()
        due = zeros.is_cpu or self.counters["refreshes"] % LOOK_EVERY in (0, 1)
        if not self._warned_of_zeros and due and (fraction := zeros.item()) > ZEROS_ALLOWED:
            self._warned_of_zeros = True
            warnings.warn(
                f"{type(rule).__name__}: {fraction:.0%} of the entries that the step moves have a curvature "
                "of exactly zero and are divided by eps alone, which can ruin the training; pass floor=0.01 "
                "to Sassha, MSassha, LazyHessian or LazyCurvature, or take a larger eps",
                stacklevel=6,
            )

    def _back_off(self, scaler: GradScaler | None, refreshes: int) -> None:
        if (scale := self._scale(scaler)) > 1:
            self.counters.update(hessian_scale=scale / 2, hessian_scale_age=0)
            return
        self._failed_in_a_row += 1
        if not refreshes and self._failed_in_a_row >= FAILURES_ALLOWED:
            half = (
                "; or the second derivative of some operation does not fit float16: use "
                "estimator='gauss_newton' or precision='amp_bf16'"
            )
            raise RuntimeError(
                f"the Hessian estimate was not finite on the first {self._failed_in_a_row} steps: nothing "
                "can be trained; look for a loss that is not finite, or for an infinite second derivative "
                f"(the root or the norm of 0){'' if scaler is None else half}"
            )
        warnings.warn(
            "the Hessian estimate is not finite; the refresh is tried again on the next step", stacklevel=6
        )

    def _grow(self, scaler: GradScaler) -> None:
        scale, age = self._scale(scaler), self.counters["hessian_scale_age"] + 1
        if age == HESSIAN_SCALE_GROWTH:
            scale, age = min(2 * scale, HESSIAN_SCALE_MAX), 0
        self.counters.update(hessian_scale=scale, hessian_scale_age=age)

    def _scale(self, scaler: GradScaler | None) -> float:
        return self.counters["hessian_scale"] if scaler is not None else 1.0
