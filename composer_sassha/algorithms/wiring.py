"""Connects the algorithms to the Trainer: its passes, the wrapped optimizer, the scaler and the log."""

import inspect
from collections.abc import Callable, Sequence
from typing import Any

from composer.core import Event, Precision, State
from composer.loggers import Logger
from torch import Tensor

from composer_sassha.algorithms.given import samples_of
from composer_sassha.algorithms.grad_scaler import ClosureGradScaler
from composer_sassha.common.batches import Samples, copied, writable
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
        self.samples = Samples()
        self._microbatches: Sequence[Any] | None = None  # of the running step

    def run(self, closure: Closure, *, sync: bool = True, hidden: bool = False) -> Any:
        """Run one pass; see `PassRunner`. The Trainer's closure handles `sync` itself."""
        state = self.state
        self._prepare(closure)
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
        self._batch, self._microbatches = self.state.batch, None

    def _prepare(self, closure: Closure) -> None:
        """Read the DataSpec, and give a pass that is one of several its own copy of the microbatches.

        A model, a transform of the DataSpec or an algorithm may write into its microbatch: into a container
        that the Trainer does not copy for each pass, or into a tensor that it does not move to the device.
        """
        # Composer's State leads to neither, but the variables of the Trainer's closure do.
        closure = inspect.unwrap(closure)
        variables = dict(zip(closure.__code__.co_freevars, closure.__closure__ or (), strict=True))
        self.samples = samples_of(variables["self"].cell_contents._train_data_spec)
        if phase(self.state) is None:
            return
        microbatches = variables["microbatches"]
        if self._microbatches is None:
            self._microbatches = microbatches.cell_contents
        # The last pass may have the tensors themselves: nothing reads them any more, and a copy costs memory.
        device = next(self.state.model.parameters()).device
        last = phase(self.state) == "descent"
        microbatches.cell_contents = copied(
            self._microbatches, lambda t: t if last or t.device != device else writable(t)
        )

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


def scale_gradients(state: State) -> None:
    """Install our gradient scaler if the precision is float16; call it again when fit() has made another."""
    if state.precision == Precision.AMP_FP16 and not isinstance(state.scaler, ClosureGradScaler):
        state.scaler = ClosureGradScaler("cuda" if state.device.name == "gpu" else "cpu")


def phase(state: State) -> str | None:
    """Return which of a perturbed step's two passes is running: "ascent", "descent", or None."""
    (optimizer,) = state.optimizers
    return optimizer.phase if isinstance(optimizer, SharpnessAwareOptimizer) else None


def samples(state: State) -> Samples:
    """Return how the batches of the Trainer's loader are counted and cut; during a step."""
    (optimizer,) = state.optimizers
    found: Samples = optimizer.runner.samples
    return found


def log(state: State, logger: Logger, prefix: str, names: tuple[str, ...]) -> None:
    """Log those of the latest step's metrics that have these names."""
    (optimizer,) = state.optimizers
    assert isinstance(optimizer, SharpnessAwareOptimizer)
    found = {f"{prefix}/{name}": optimizer.metrics[name] for name in names if name in optimizer.metrics}
    metrics = {name: v.item() if isinstance(v, Tensor) else v for name, v in found.items()}
    if metrics:
        logger.log_metrics(metrics)
