"""Runs the closure for one pass, in a plain PyTorch loop."""

import contextlib
import inspect
from collections.abc import Callable
from typing import Any

from torch import nn

from composer_sassha.common.ranks import data_parallel

Closure = Callable[..., Any]


class PassRunner:
    """Calls the closure for one pass in a plain PyTorch loop; `algorithms.wiring` has the Trainer's runner.

    Args:
        model: the model that the closure runs. Only a `DistributedDataParallel` is needed here, the model or
            a part of it: passes with `sync=False` then leave its gradients unsynchronized.
    """

    def __init__(self, model: nn.Module | None = None) -> None:
        self.model, self._ddp = model, data_parallel(model)

    @property
    def must_synchronize(self) -> bool:
        """Whether every pass must be synchronized.

        DDP with find_unused_parameters keeps the set of used parameters from an unsynchronized pass, and
        fails if the next pass uses others.
        """
        return any(getattr(ddp, "find_unused_parameters", False) for ddp in self._ddp)

    def run(self, closure: Closure, *, sync: bool = True, hidden: bool = False, applied: bool = True) -> Any:
        """Run one pass and return the closure's loss, or None if the gradient overflowed.

        Args:
            closure: computes the loss and its gradients.
            sync: average the gradients over the ranks.
            hidden: leave no trace in metrics and logs. A plain loop has none, so that it is ignored here.
            applied: the gradient is the update. Else what edits gradients must leave it alone (clipping, for
                one), which `edit_update` does later, if at all. A plain loop edits in its closure or in a
                hook of the base optimizer, so that this is ignored here.

        Raises:
            RuntimeError: the closure is a Composer Trainer's, which this runner does not serve.
        """
        del hidden, applied  # a plain loop logs the loss that `step` returns
        if "loss_dict" in inspect.signature(closure).parameters:
            raise RuntimeError(
                "in a Composer Trainer the passes need an algorithm: add composer_sassha.SAM() or Sassha() "
                "to its algorithms, and give it the plain optimizer"
            )
        with contextlib.ExitStack() as stack:
            for ddp in () if sync else self._ddp:
                stack.enter_context(ddp.no_sync())
            return closure()

    def edit_update(self) -> None:
        """Edit an update that was made of several gradients, now in their place; here nothing."""

    def begin(self) -> None:
        """Prepare for a step; called before its first pass."""
        self._ddp = data_parallel(self.model)  # which may have been wrapped since
        self.share_buffers()

    def share_buffers(self) -> None:
        """Make the next forward start from rank 0's buffers."""
        # DDP broadcasts rank 0's buffers before a forward only if the forward before it was synchronized. A
        # step may have no synchronized pass at all, and BatchNorm's statistics would drift apart.
        for ddp in self._ddp:
            ddp.require_forward_param_sync = True

    def rollback(self) -> None:
        """Undo what the passes since `begin` left behind besides weights, buffers and RNG; here nothing."""
