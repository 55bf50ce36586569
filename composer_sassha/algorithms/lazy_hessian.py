"""The lazy Hessian refresh as a Composer algorithm."""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from composer.core import Event, Precision, State, get_precision_context
from composer.loggers import Logger
from composer.utils import ensure_tuple
from torch import Tensor

from composer_sassha.algorithms import checks, wiring
from composer_sassha.algorithms.base import MethodAlgorithm
from composer_sassha.algorithms.given import CUTTABLE, Given
from composer_sassha.algorithms.predictions import predictions
from composer_sassha.common.batches import Samples, copied, must_divide, select, shared, unwrapped
from composer_sassha.common.losses import total_loss
from composer_sassha.curvature import Evaluation, LazyCurvature
from composer_sassha.optim import SharpnessAwareOptimizer

# Sets, because comparing Composer's events one by one is slow, and `match` runs on every event of every step.
_EVENTS = frozenset((*wiring.START, Event.BATCH_END))
_ESTIMATING = frozenset((Event.BEFORE_TRAIN_BATCH, Event.BEFORE_FORWARD, Event.BEFORE_BACKWARD))
_EVALUATING = frozenset((Event.AFTER_FORWARD, Event.BEFORE_LOSS, Event.AFTER_LOSS))

# The metrics to log, under the prefix "hessian".
LOGGED = ("mean_abs", "negative_fraction", "zero_fraction", "refreshes", "failed_refreshes", "skipped_steps")


class LazyHessian(MethodAlgorithm):
    """Estimates the Hessian's diagonal every `interval` steps, for the optimizer (SASSHA, arXiv 2502.18153).

    The estimate is taken on the pass whose gradient updates the weights: at w + e on a perturbed step.
    On BEFORE_BACKWARD the gradient and the estimate are computed, and the loss is replaced by a stand-in
    whose backward delivers that gradient. No other pass builds a second-order graph. Microbatches count with
    the Trainer's own weights, and ranks are averaged in one collective.

    `estimator` is one of

    - 'hutchinson': `z * (H z)`, z Rademacher (Bekas et al. 2007). The Hessian, for every loss and network
      that can be differentiated twice.
    - 'gauss_newton': squared gradients at labels drawn from the model (Sophia, Liu et al. 2024). The Hessian
      without its part that can be negative, for a mean cross-entropy over the softmax of logits: outputs [N,
      classes, ...] with labels in batch[1], or a Hugging Face model's outputs['logits'] and batch['labels'].
    - 'empirical_fisher': squared gradients at the true labels. Free, but not the Hessian (Kunstner et al.
      2019).
    - 'finite_difference': `z * (g(w + h z) - g(w)) / h`. The Hessian of a smooth network (GELU, SiLU, tanh),
      in precision fp32.

    With a `batch_fraction` below 1, the estimate is taken on the first samples of each rank's batch. A
    microbatch that is partly among them is evaluated again on those samples.

    Logs on refresh steps `hessian/mean_abs`, `hessian/negative_fraction`, `hessian/refreshes`, and with
    SASSHA and AdaHessian `hessian/zero_fraction`: of the entries that the step moves, the fraction that is
    divided by `eps` alone because its curvature is exactly zero. Logs `hessian/failed_refreshes` if the
    estimate was not finite, and `hessian/skipped_steps` on skipped steps; these two count from the start of
    the process.

    Args:
        interval: steps between refreshes, >= 1. Default: 10.
        estimator: its name, see above. Default: 'hutchinson'.
        samples: probes, or draws of labels, per microbatch, >= 1; 1 with 'empirical_fisher'. Default: 1.
        seed: determines the draws, >= 0. Default: 0.
        batch_fraction: the fraction of the batch to estimate on, in (0, 1]. Default: 1.
        floor: the smallest magnitude of an entry of the estimate, as a fraction of the mean magnitude in its
            tensor, in [0, 1]; 0.01 where the curvature of many weights is exactly zero. Default: 0.

    Raises:
        TypeError, ValueError: an argument that is not allowed; at the Trainer's start, a combination that is
            not.

    Example:
        >>> LazyHessian(interval=5)
        LazyHessian(interval=5, estimator='hutchinson', samples=1, seed=0, batch_fraction=1.0, floor=0.0)
    """

    # After the algorithms that change the loss on BEFORE_BACKWARD (MixUp, CutMix): the Hessian must be that
    # of the changed loss.
    runs_late = 1

    def __init__(
        self,
        interval: int = 10,
        estimator: str = "hutchinson",
        samples: int = 1,
        seed: int = 0,
        batch_fraction: float = 1.0,
        floor: float = 0.0,
    ) -> None:
        self.curvature: LazyCurvature = LazyCurvature(
            interval, estimator, samples, seed, batch_fraction, floor
        )
        self._batch_size: float | None = None
        self._hook: Any = None  # on the coming forward
        self._forget()

    def __repr__(self) -> str:
        return repr(self.curvature).replace("LazyCurvature", "LazyHessian")

    def match(self, event: Event, state: State) -> bool:
        """Whether to run: at the Trainer's start, on passes that estimate, and at the end of each batch."""
        if event in _EVENTS:
            return True
        (optimizer,) = state.optimizers
        if not isinstance(optimizer, SharpnessAwareOptimizer) or optimizer.refresh.estimation is None:
            return False
        return event in _ESTIMATING or (event in _EVALUATING and self.curvature.evaluates_again)

    def apply(self, event: Event, state: State, logger: Logger) -> None:
        """Wrap the optimizer, estimate, or log."""
        if event == Event.INIT:
            self._check_precision(state)
            checks.check(state)
            checks.sort(state)
        elif event == Event.BEFORE_LOAD:
            optimizer = wiring.wrapped_optimizer(state, self._forget)
            optimizer.set_curvature(self.curvature)
            wiring.bring(optimizer, self.curvature)
        elif event == Event.FIT_START:
            wiring.refuse_another_trainers(state)
            self._check_precision(state)
            wiring.scale_gradients(state)
            checks.sort(state)  # loading may have added algorithms
        elif event == Event.BEFORE_TRAIN_BATCH:
            self._batch_size = wiring.samples(state).count(state.batch)
        elif event == Event.BEFORE_FORWARD:
            # Algorithms that run later than this one (ESAM) may still change the batch.
            self._hook = state.model.register_forward_pre_hook(self._look_at_batch(state), prepend=True)
        elif event in _EVALUATING:
            assert self._replay is not None
            self._replay.follow(event)
        elif event == Event.BEFORE_BACKWARD:
            self._estimate(state)
        else:
            wiring.log(state, logger, "hessian", LOGGED)

    def _forget(self) -> None:
        self._replay: _Replay | None = None
        self._batch: Any = None  # the microbatch before its forward, which may edit it
        self._size: float | None = None
        if self._hook is not None:
            self._hook.remove()

    def _look_at_batch(self, state: State) -> Callable[[Any, tuple[Any]], None]:
        """Return a hook for the coming forward, which notes its batch."""

        def look(module: Any, inputs: tuple[Any]) -> None:
            self._hook.remove()
            samples = wiring.samples(state)
            self._batch, self._size = copied(inputs[0], shared), samples.count(inputs[0])
            if self.curvature.evaluates_again:
                self._replay = _Replay(state, inputs[0], samples, self._size)

        return look

    def _estimate(self, state: State) -> None:
        logits, labels = None, None
        if self.curvature.needs.predictions:
            logits, labels = predictions(unwrapped(state.model), state.outputs, state.batch, self._batch)
        size, replay = self._size, self._replay
        self._forget()
        (optimizer,) = state.optimizers

        def attach(loss: Tensor) -> Tensor:
            return optimizer.attach(
                loss,
                logits=logits,
                labels=labels,
                size=size,
                batch_size=self._batch_size,
                again=replay,
            )

        state.loss = _with_total(state.loss, attach)

    def _check_precision(self, state: State) -> None:
        if not self.curvature.needs.smooth:
            return
        if state.precision != Precision.FP32:
            raise ValueError(
                f"LazyHessian: estimator='finite_difference' needs precision='fp32'; gradients in "
                f"'{state.precision.value}' drown in the difference; use another estimator"
            )
        tf32 = torch.backends.cuda.matmul.allow_tf32 or torch.backends.cudnn.allow_tf32
        if state.device.name == "gpu" and tf32:
            raise ValueError(
                "LazyHessian: estimator='finite_difference' needs products in full float32; pass "
                "device=composer.devices.DeviceGPU(allow_tf32=False) to the Trainer, or use another estimator"
            )


class _Replay:
    """Evaluates a microbatch a second time, with the same random numbers and buffers, and leaves no trace.

    Must be made before the microbatch's forward, whose RNG states and buffers it copies.
    """

    def __init__(self, state: State, batch: Any, samples: Samples, size: float) -> None:
        self.state = state
        self.samples, self.given, self.size = samples, Given(batch), size
        self.before = wiring.snapshot(state, learn=False)

    def follow(self, event: Event) -> None:
        """Note the batch after the forward and before the loss, and then the loss of the model."""
        if event == Event.AFTER_FORWARD:
            self.given.after_forward(self.state.batch)
        elif event == Event.BEFORE_LOSS:
            self.given.before_loss(self.state.batch)
        else:
            self.loss = self._loss_parts()

    @contextlib.contextmanager
    def __call__(self, count: int) -> Iterator[Evaluation]:
        """Yield an evaluation of the first `count` samples; differentiate it within the context."""
        if not self._loss_is_the_models():
            raise RuntimeError(
                "LazyHessian: another algorithm changed the loss of the model (MixUp does with "
                "interpolate_loss=True), which estimator='finite_difference' and batch_fraction < 1 cannot "
                "compute again; turn one of the two off"
            )
        state, model = self.state, unwrapped(self.state.model)
        first = self._first(self.given.for_forward(), count)
        given = copied(first, shared)
        with self.before.again():  # until this loss has been differentiated
            with get_precision_context(state.precision, state.precision_config):
                outputs = model(first)
                batch = self.given.for_loss(first, lambda part: self._first(part, count, inside=True))
                found = predictions(model, outputs, batch, given)
                loss = model.loss(outputs, batch)
            yield Evaluation(total_loss(loss), *found)

    def _first(self, batch: Any, count: int, inside: bool = False) -> Any:
        """Return the first samples of the microbatch, or of a part `inside` of it."""
        what = f"LazyHessian: a batch_fraction below 1 takes the first {count} samples of a microbatch"
        with must_divide(what, f"{CUTTABLE}, or set batch_fraction=1"):
            if inside:
                return select(batch, slice(count), self.size, inside) if count < self.size else batch
            return self.samples.first(batch, count, self.size)

    def _loss_parts(self) -> list[tuple[Tensor, int]]:
        loss = self.state.loss
        parts = loss.values() if isinstance(loss, Mapping) else ensure_tuple(loss)
        return [(part, part._version) for part in parts]

    def _loss_is_the_models(self) -> bool:
        now = self._loss_parts()
        return len(now) == len(self.loss) and all(
            part is model_part and version == model_version
            for (part, version), (model_part, model_version) in zip(now, self.loss, strict=True)
        )


def _with_total(loss: Any, attach: Any) -> Any:
    """Return the loss with the stand-in as its total; all other parts are detached.

    The Trainer must find the same structure, and log the same values.
    """
    total = attach(total_loss(loss))
    if isinstance(loss, Tensor):
        return total
    if isinstance(loss, Mapping) and "total" in loss:
        return {**{name: part.detach() for name, part in loss.items()}, "total": total}
    # The Trainer adds up the means of the parts and logs each one. Keep their values, and attach the total's
    # gradient to the first part by a term that is zero.
    parts = loss.values() if isinstance(loss, Mapping) else loss
    values = [part.detach().mean() for part in parts]
    values[0] = values[0] + (total - total.detach())
    return dict(zip(loss, values, strict=True)) if isinstance(loss, Mapping) else tuple(values)
