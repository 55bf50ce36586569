"""What surrounds a pass: the closure's call, and the state that a pass changes besides the gradients."""

import inspect
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from composer_sassha._tensors import copy_into, copy_of

Closure = Callable[..., Any]


class PassRunner:
    """Calls the closure for one pass. This one serves a plain PyTorch loop; `algorithms` has the Trainer's.

    Args:
        model: the model that the closure runs; needed only when it is a `DistributedDataParallel`, whose
            gradients are then left unsynchronized in passes that ask for it.
    """

    def __init__(self, model: nn.Module | None = None) -> None:
        self.model = model

    @property
    def must_synchronize(self) -> bool:
        """Whether every pass has to be synchronized.

        DDP with find_unused_parameters remembers from an unsynchronized pass which parameters were used, and
        fails where the next pass uses others.
        """
        ddp = isinstance(self.model, DistributedDataParallel)
        return ddp and getattr(self.model, "find_unused_parameters", False)

    def run(self, closure: Closure, *, sync: bool = True, hidden: bool = False) -> Any:
        """Run one pass and return the closure's loss, or None if the gradient overflowed.

        Args:
            closure: computes the loss and its gradients.
            sync: average the gradients over the ranks.
            hidden: leave no trace in metrics and logs.

        Raises:
            RuntimeError: the closure is a Composer Trainer's, which this runner does not serve.
        """
        del hidden  # a plain loop logs the loss that `step` returns, and that is the first pass's
        if "loss_dict" in inspect.signature(closure).parameters:
            raise RuntimeError(
                "in a Composer Trainer the passes need an algorithm: add composer_sassha.SAM() or Sassha() "
                "to its algorithms, and give it the plain optimizer"
            )
        if isinstance(self.model, DistributedDataParallel) and not sync:
            with self.model.no_sync():
                return closure()
        return closure()

    def begin(self) -> None:
        """Called before the first pass of a step."""
        self.share_buffers()

    def share_buffers(self) -> None:
        """Have the next forward begin with rank 0's buffers."""
        # DDP broadcasts rank 0's buffers before a forward only if the one before it was synchronized. A step
        # may have no such pass at all, and BatchNorm's statistics would drift apart.
        if isinstance(self.model, DistributedDataParallel):
            self.model.require_forward_param_sync = True

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
        # A module may put another tensor in a buffer's place, or write into it: remember tensor and values.
        self._buffers = [
            (module, name, buffer)
            for module in (model.modules() if model is not None else ())
            for name, buffer in module._buffers.items()
            if buffer is not None
        ]
        self._writable = [buffer for _, _, buffer in self._buffers if _is_writable(buffer)]
        self._values = copy_of(self._writable)

    def restore(self) -> None:
        """Put everything back."""
        random.setstate(self._python)
        np.random.set_state(self._numpy)  # noqa: NPY002
        torch.set_rng_state(self._torch)
        for device, state in self._cuda.items():
            torch.cuda.set_rng_state(state, device)
        for module, name, buffer in self._buffers:
            module._buffers[name] = buffer
        copy_into(self._writable, self._values)


def _is_writable(buffer: Tensor) -> bool:
    """Neither made in inference mode, nor expanded, nor compressed: nobody can write into those in place."""
    if buffer.layout == torch.strided and buffer.is_contiguous():
        return not buffer.is_inference()
    if buffer.layout not in (torch.strided, torch.sparse_coo):
        return False
    expanded = any(
        stride == 0 and size > 1 for stride, size in zip(buffer.stride(), buffer.shape, strict=True)
    )
    return not (buffer.is_inference() or expanded)
