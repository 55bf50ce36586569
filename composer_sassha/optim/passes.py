"""What surrounds a pass: the closure's call, and the state that a pass changes besides the gradients."""

import random
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

Closure = Callable[..., Any]


class PassRunner:
    """Calls the closure for one pass. This one serves a plain PyTorch loop; `algorithms` has the Trainer's.

    Args:
        model: the model that the closure runs; needed only when it is a `DistributedDataParallel`, whose
            gradients are then left unsynchronized in passes that ask for it.
    """

    def __init__(self, model: nn.Module | None = None) -> None:
        self.model = model

    def run(self, closure: Closure, *, sync: bool = True, hidden: bool = False) -> Any:
        """Run one pass and return the closure's loss, or None if the gradient overflowed.

        Args:
            closure: computes the loss and its gradients.
            sync: average the gradients over the ranks.
            hidden: leave no trace in metrics and logs.
        """
        del hidden  # a plain loop logs the loss that `step` returns, and that is the first pass's
        if isinstance(self.model, DistributedDataParallel) and not sync:
            with self.model.no_sync():
                return closure()
        return closure()

    def begin(self) -> None:
        """Called before the first pass of a step."""

    def rollback(self) -> None:
        """Undo what the passes since `begin` left outside of weights, buffers and RNG: here nothing."""


class Snapshot:
    """The RNG states and the model's buffers at one moment: what one pass changes and the next must not see.

    Args:
        model: its buffers are kept, BatchNorm's running statistics among them; None keeps the RNG states
            only.
        devices: the CUDA devices whose generators are kept.
    """

    def __init__(self, model: nn.Module | None, devices: set[torch.device]) -> None:
        self._python = random.getstate()
        self._numpy = np.random.get_state()  # noqa: NPY002 - data augmentations use the global generator
        self._torch = torch.get_rng_state()
        self._cuda = {device: torch.cuda.get_rng_state(device) for device in devices if device.type == "cuda"}
        # A module may write into a buffer or put another tensor in its place: remember the tensor and its
        # values.
        self._buffers = [
            (module, name, buffer)
            for module in (model.modules() if model is not None else ())
            for name, buffer in module._buffers.items()
            if buffer is not None
        ]
        self._values = copy_of([buffer for _, _, buffer in self._buffers])

    def restore(self) -> None:
        """Put everything back."""
        random.setstate(self._python)
        np.random.set_state(self._numpy)  # noqa: NPY002
        torch.set_rng_state(self._torch)
        for device, state in self._cuda.items():
            torch.cuda.set_rng_state(state, device)
        for module, name, buffer in self._buffers:
            module._buffers[name] = buffer
        if self._buffers:
            with torch.no_grad():
                torch._foreach_copy_([buffer for _, _, buffer in self._buffers], self._values)


def copy_of(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Clone a list of tensors in one call."""
    copies = [torch.empty_like(t) for t in tensors]
    if copies:
        with torch.no_grad():
            torch._foreach_copy_(copies, list(tensors))
    return copies
