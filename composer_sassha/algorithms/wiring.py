"""Connects the algorithms to the Trainer: its passes, the wrapped optimizer, the scaler and the log."""

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from composer.core import Event, Precision, State
from composer.loggers import Logger
from torch import Tensor
from torch.utils._pytree import tree_map

from composer_sassha.algorithms.given import samples_of
from composer_sassha.algorithms.grad_scaler import ClosureGradScaler
from composer_sassha.common.batches import Samples, copied, writable
from composer_sassha.common.ranks import world
from composer_sassha.common.snapshot import Snapshot
from composer_sassha.common.tensors import read
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
        self._postponed: list[Callable[[], Any]] = []
        # Called when an exception has ended a step, to drop what algorithms keep between its passes.
        self.on_rollback: list[Callable[[], None]] = []
        self.samples = Samples()
        self._microbatches: Sequence[Any] | None = None  # of the running step
        self.brought: list[Any] = []  # the perturbation and the curvature that this Trainer's algorithms set

    def run(self, closure: Closure, *, sync: bool = True, hidden: bool = False, applied: bool = True) -> Any:
        """Run one pass; see `PassRunner`. The Trainer's closure handles `sync` itself."""
        self._prepare(closure)
        with contextlib.nullcontext() if applied else self._without_edits():
            return self._run(closure, sync, hidden)

    def _run(self, closure: Closure, sync: bool, hidden: bool) -> Any:
        state = self.state
        if not hidden:
            return closure(ddp_sync=sync)
        # The closure updates these and logs `loss_dict`, whichever pass it runs: give it others to write to.
        # The seen outputs are not kept: they would be one batch of logits more at the peak of this pass.
        # There is no loss after an out-of-memory error, when the Trainer deletes it to try again.
        seen = state.train_metrics, tree_map(_detached, getattr(state, "loss", torch.Tensor()))
        state.train_metrics, state.loss, state.outputs = {}, torch.Tensor(), torch.Tensor()
        try:
            return closure(ddp_sync=sync, loss_dict={})
        finally:
            state.train_metrics, state.loss = seen
            state.outputs = torch.Tensor()  # nor are the hidden ones shown in their place

    @contextlib.contextmanager
    def _without_edits(self) -> Iterator[None]:
        """Postpone what algorithms do on AFTER_TRAIN_BATCH, where they edit the gradient that is applied."""
        self._postponed = []

        def postpone(apply: Callable[..., Any], event: Event, *args: Any) -> Any:
            if event != Event.AFTER_TRAIN_BATCH:
                return apply(event, *args)
            self._postponed.append(functools.partial(apply, event, *args))
            return None

        # Not in another list: the engine sorts algorithms by their class, and others look for theirs.
        algorithms = {id(algorithm): algorithm for algorithm in self.state.algorithms}.values()
        own = [vars(algorithm).get("apply") for algorithm in algorithms]
        for algorithm in algorithms:
            vars(algorithm)["apply"] = functools.partial(postpone, algorithm.apply)
        try:
            yield
        finally:
            for algorithm, apply in zip(algorithms, own, strict=True):
                del vars(algorithm)["apply"]
                if apply is not None:
                    vars(algorithm)["apply"] = apply

    def edit_update(self) -> None:
        """Let the algorithms edit the update, as they do with the gradient of plain SGD."""
        for edit in self._postponed:
            edit()
        self._postponed = []

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
        names = getattr(getattr(closure, "__code__", None), "co_freevars", ())
        variables = dict(zip(names, getattr(closure, "__closure__", None) or (), strict=True))
        if not {"self", "microbatches"} <= variables.keys():
            return  # a Trainer with a closure of its own
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


def _detached(value: Any) -> Any:
    return value.detach() if isinstance(value, Tensor) else value


def wrapped_optimizer(state: State, on_rollback: Callable[[], None] | None = None) -> SharpnessAwareOptimizer:
    """Return the Trainer's optimizer, and wrap it if no other algorithm and not the user has done so.

    Called at BEFORE_LOAD, so that a checkpoint is loaded into the wrapper.

    Args:
        state: the Trainer's.
        on_rollback: called when an exception has ended a step.

    Raises:
        SettingError: the user has, and has given it a process group that is not all ranks.
    """
    (optimizer,) = state.optimizers
    if not isinstance(optimizer, SharpnessAwareOptimizer):
        optimizer = SharpnessAwareOptimizer(optimizer)
        state.optimizers = optimizer
    if optimizer.process_group is not None and optimizer.process_group.size != world().size:
        raise SettingError(
            "SharpnessAwareOptimizer: process_group= is not allowed in a Trainer, all ranks of which train "
            "one model; leave it out"
        )
    optimizer.model, optimizer.process_group = state.model, world()
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
        device = "cuda" if state.device.name == "gpu" else "cpu"
        state.scaler = ClosureGradScaler(device, process_group=world())


def snapshot(state: State, learn: bool = True) -> Snapshot:
    """Return what a pass of the running step changes as it is now; `learn`: see `SideEffects.take`."""
    (optimizer,) = state.optimizers
    assert isinstance(optimizer, SharpnessAwareOptimizer)
    return optimizer.protection.snapshot(optimizer.model, learn=learn)


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
    """Log those of the latest step's metrics that have these names, and read them for that."""
    (optimizer,) = state.optimizers
    assert isinstance(optimizer, SharpnessAwareOptimizer)
    found = {f"{prefix}/{name}": optimizer.metrics[name] for name in names if name in optimizer.metrics}
    if found and logger.destinations:
        logger.log_metrics(dict(zip(found, read(found.values()), strict=True)))
