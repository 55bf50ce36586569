"""Connects the algorithms to the Trainer: its passes, the wrapped optimizer, the scaler and the log."""

from collections.abc import Callable
from typing import Any

from composer.core import Event, Precision, State
from composer.loggers import Logger
from torch import Tensor
from torch.utils._pytree import tree_leaves

from composer_sassha.algorithms.grad_scaler import ClosureGradScaler
from composer_sassha.common.validate import SettingError
from composer_sassha.optim import PassRunner, SharpnessAwareOptimizer
from composer_sassha.optim.passes import Closure

# The events on which an algorithm checks, wraps the optimizer, and adapts to the precision given to fit().
START = (Event.INIT, Event.BEFORE_LOAD, Event.FIT_START)


class TrainerPasses(PassRunner):
    """Runs passes through the Trainer's closure, and keeps hidden ones out of metrics and logs."""

    def __init__(self, state: State) -> None:
        super().__init__(state.model)
        self.state = state
        # Called when an exception has ended a step, to drop what algorithms keep between its passes.
        self.on_rollback: list[Callable[[], None]] = []
        self.brought: list[Any] = []  # the perturbation and the curvature that this Trainer's algorithms set

    def run(self, closure: Closure, *, sync: bool = True, hidden: bool = False) -> Any:
        """Run one pass; see `PassRunner`. The Trainer's closure handles `sync` itself."""
        state = self.state
        if any(part._version != version for part, version in self._versions):
            raise SettingError(
                "an algorithm has written into the batch (CutMix does, into targets as large as the images), "
                "which a second pass would see; leave it out, or use MSAM, which needs one pass"
            )
        if not hidden:
            return closure(ddp_sync=sync)
        # The closure updates these and logs `loss_dict`, whichever pass it runs: give it others to write to.
        seen = state.train_metrics, state.loss, state.outputs
        state.train_metrics = {}
        try:
            return closure(ddp_sync=sync, loss_dict={})
        finally:
            state.train_metrics, state.loss, state.outputs = seen

    def begin(self) -> None:
        """Keep the batch, which an interrupted pass would replace."""
        self.model = self.state.model  # the Trainer has wrapped it for DDP since
        super().begin()
        self._batch = self.state.batch
        # PyTorch counts the in-place writes to a tensor in `_version`; `run` compares before every pass.
        self._versions = [(p, p._version) for p in tree_leaves(self._batch) if isinstance(p, Tensor)]

    def rollback(self) -> None:
        """Restore the batch, and reset the metrics as the Trainer had done before the step."""
        self.state.batch = self._batch
        for metric in (self.state.train_metrics or {}).values():
            metric.reset()
        for forget in self.on_rollback:
            forget()


def wrapped_optimizer(state: State, on_rollback: Callable[[], None] | None = None) -> SharpnessAwareOptimizer:
    """Return the Trainer's optimizer, and wrap it if no other algorithm and not the user has done so.

    Called at BEFORE_LOAD, so that a checkpoint is loaded into the wrapper.

    Args:
        state: the Trainer's.
        on_rollback: called when an exception has ended a step.
    """
    (optimizer,) = state.optimizers
    if not isinstance(optimizer, SharpnessAwareOptimizer):
        optimizer = SharpnessAwareOptimizer(optimizer)
        state.optimizers = optimizer
    optimizer.model = state.model
    if not isinstance(optimizer.runner, TrainerPasses) or optimizer.runner.state is not state:
        optimizer.runner = TrainerPasses(state)
    if on_rollback is not None:
        optimizer.runner.on_rollback.append(on_rollback)
    scale_gradients(state)
    return optimizer


def bring(optimizer: SharpnessAwareOptimizer, part: Any) -> None:
    """Note a perturbation or a curvature that a Trainer's algorithm has set, for `take_back`."""
    assert isinstance(optimizer.runner, TrainerPasses)
    optimizer.runner.brought.append(part)


def take_back(state: State) -> None:
    """Remove from the optimizer what the algorithms of an earlier Trainer have set."""
    (optimizer,) = state.optimizers
    runner = getattr(optimizer, "runner", None)
    if not isinstance(runner, TrainerPasses) or runner.state is state:
        return
    if any(optimizer.perturbation is part for part in runner.brought):
        optimizer.set_perturbation(None)
    if any(optimizer.curvature is part for part in runner.brought):
        optimizer.set_curvature(None)


def refuse_another_trainers(state: State) -> None:
    """Raise SettingError if the optimizer has been given to another Trainer since this one was built."""
    (optimizer,) = state.optimizers
    if optimizer.runner.state is not state:
        raise SettingError(
            "the SharpnessAwareOptimizer has been given to another Trainer since this one was built, and "
            "runs the other's passes; finish one Trainer before the next is built, or give each its own"
        )


def scale_gradients(state: State) -> None:
    """Install our gradient scaler if the precision is float16; call it again when fit() has made another."""
    if state.precision == Precision.AMP_FP16 and not isinstance(state.scaler, ClosureGradScaler):
        state.scaler = ClosureGradScaler("cuda" if state.device.name == "gpu" else "cpu")


def phase(state: State) -> str | None:
    """Return which of a perturbed step's two passes is running: "ascent", "descent", or None."""
    (optimizer,) = state.optimizers
    return optimizer.phase if isinstance(optimizer, SharpnessAwareOptimizer) else None


def log(state: State, logger: Logger, prefix: str, names: tuple[str, ...]) -> None:
    """Log those of the latest step's metrics that have these names."""
    (optimizer,) = state.optimizers
    assert isinstance(optimizer, SharpnessAwareOptimizer)
    found = {f"{prefix}/{name}": optimizer.metrics[name] for name in names if name in optimizer.metrics}
    metrics = {name: v.item() if isinstance(v, Tensor) else v for name, v in found.items()}
    if metrics:
        logger.log_metrics(metrics)
