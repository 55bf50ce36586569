"""A copy of all that one pass changes besides the gradients: random number generators and buffers."""

import random

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from composer_sassha.common.tensors import copy_into, copy_of


class Snapshot:
    """Copies the RNG states and a model's buffers, so that a second pass can start from the same ones.

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
        # A pass may write into a buffer, or put another tensor in its place: keep the values and the tensor.
        self._buffers = [
            (module, name, buffer)
            for module in (model.modules() if model is not None else ())
            for name, buffer in module._buffers.items()
            if buffer is not None
        ]
        self._writable = [buffer for _, _, buffer in self._buffers if _is_writable(buffer)]
        self._values = copy_of(self._writable)

    def restore(self) -> None:
        """Restore the RNG states and the buffers to what they were."""
        random.setstate(self._python)
        np.random.set_state(self._numpy)  # noqa: NPY002
        torch.set_rng_state(self._torch)
        for device, state in self._cuda.items():
            torch.cuda.set_rng_state(state, device)
        for module, name, buffer in self._buffers:
            module._buffers[name] = buffer
        copy_into(self._writable, self._values)


def _is_writable(buffer: Tensor) -> bool:
    """Whether the buffer supports in-place writes (not an inference, expanded or compressed tensor)."""
    if is_lazy(buffer) or buffer.is_quantized or buffer.is_nested:
        return False
    if buffer.layout == torch.strided and buffer.is_contiguous():
        return not buffer.is_inference()
    if buffer.layout not in (torch.strided, torch.sparse_coo):
        return False
    expanded = any(
        stride == 0 and size > 1 for stride, size in zip(buffer.stride(), buffer.shape, strict=True)
    )
    return not (buffer.is_inference() or expanded)
