"""What a step may change besides weights and optimizer state, and how it is put back."""

from collections.abc import Iterable
from types import TracebackType

import torch
from torch import nn

from composer_sassha.common.snapshot import Snapshot
from composer_sassha.optim.passes import PassRunner


class Transaction:
    """One step: committed, or undone.

    Every pass starts from the buffers and random numbers that the step started from, since it must see the
    same function: dropout masks, augmentations, statistics. What the seen pass left behind is put back at
    the end. An exception undoes all of it.

    Args:
        model: its buffers are kept; None: only the random number generators are.
        devices: those whose generators are kept.
        runner: of the passes; told when an exception ends the step.
    """

    def __init__(self, model: nn.Module | None, devices: Iterable[torch.device], runner: PassRunner) -> None:
        self.model, self.devices, self.runner = model, set(devices), runner
        self._seen: Snapshot | None = None

    def __enter__(self) -> "Transaction":
        self.runner.begin()
        self._before = Snapshot(self.model, self.devices)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            self._before.restore()
            self.runner.rollback()

    def keep_seen(self) -> None:
        """Keep what the pass that just ended left behind: the step leaves it behind too."""
        self._seen = Snapshot(self.model, self.devices)

    def start_again(self) -> None:
        """Put back what the step started from, for another pass or since the step is skipped."""
        self._before.restore()

    def finish_passes(self) -> None:
        """Put back what the seen pass left behind."""
        if self._seen is not None:
            self._seen.restore()
