"""What a step may change besides weights and optimizer state, and how it is put back."""

from types import TracebackType

from torch import nn
from torch.optim import Optimizer

from composer_sassha.common.side_effects import SideEffects
from composer_sassha.common.snapshot import Snapshot
from composer_sassha.optim.passes import PassRunner


class Protection:
    """Takes snapshots of what the passes of an optimizer's steps change, and learns what that is.

    Args:
        optimizer: whose trained parameters the snapshots leave alone.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self._optimizer = optimizer
        self._effects: SideEffects | None = None

    def snapshot(self, model: nn.Module | None, start: bool = False, learn: bool = True) -> Snapshot:
        """Return what all is now.

        Args:
            model: what the passes run; None: only the random number generators are kept.
            start: see `SideEffects.take`.
            learn: likewise.
        """
        if model is not getattr(self._effects, "model", None):
            self._effects = None if model is None else SideEffects(model)
        params = [p for group in self._optimizer.param_groups for p in group["params"]]
        trained = [p for p in params if p.requires_grad]
        return Snapshot(self._effects, {p.device for p in params}, trained, start, learn)


class Transaction:
    """One step: committed, or undone.

    Every pass starts from the model and random numbers that the step started from, since it must see the same
    function: dropout masks, augmentations, statistics. What the seen pass left behind is put back at the end.
    An exception undoes all of it.

    Args:
        protection: takes the snapshots.
        model: what the passes run.
        runner: of the passes; told when an exception ends the step.
    """

    def __init__(self, protection: Protection, model: nn.Module | None, runner: PassRunner) -> None:
        self.protection, self.model, self.runner = protection, model, runner
        self._seen: Snapshot | None = None

    def __enter__(self) -> "Transaction":
        self.runner.begin()
        self._before = self.protection.snapshot(self.model, start=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            self._before.restore()
            self.runner.rollback()

    def keep_seen(self) -> None:
        """Keep what the pass that just ended left behind: the step leaves it behind too."""
        self._seen = self.protection.snapshot(self.model)

    def start_again(self) -> None:
        """Put back what the step started from, for another pass or since the step is skipped."""
        self._before.restore()

    def finish_passes(self) -> None:
        """Put back what the seen pass left behind."""
        if self._seen is not None:
            self._seen.restore()
