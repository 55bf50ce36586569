"""Batches of any type: count their samples, select some; and the bare model that takes them."""

import copy
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch._dynamo import OptimizedModule
from torch.nn.parallel import DistributedDataParallel


def size_of(batch: Any) -> int | None:
    """Return the number of samples in a batch: the first dimension of its first tensor that has one.

    None if the batch has no such tensor.
    """
    if isinstance(batch, Tensor):
        return len(batch) if batch.ndim else None
    if isinstance(batch, Mapping):
        batch = tuple(batch.values())
    if not isinstance(batch, (tuple, list)):
        return None
    return next((size for part in batch if (size := size_of(part)) is not None), None)


def select(batch: Any, index: slice | Tensor, size: int | None) -> Any:
    """Return some samples of a batch, in new containers.

    Tensors whose first dimension is not the number of samples, and all that is no tensor, stay as they are.

    Args:
        batch: tensors in tuples, lists and mappings of any depth.
        index: the samples to select.
        size: the number of samples in the batch.
    """
    if isinstance(batch, Tensor):
        return batch[index] if batch.ndim and len(batch) == size else batch
    if isinstance(batch, Mapping):
        chosen: Any = copy.copy(batch)
        for key, value in batch.items():
            chosen[key] = select(value, index, size)
        return chosen
    if isinstance(batch, (tuple, list)):
        items = [select(item, index, size) for item in batch]
        return type(batch)(*items) if hasattr(batch, "_fields") else type(batch)(items)
    return batch


def unwrapped(model: nn.Module) -> Any:
    """Return the model inside of DistributedDataParallel and torch.compile.

    A forward of the inner model leaves the wrappers' state alone: DDP's reducer, for instance, expects a
    backward after each of its forwards.
    """
    for wrapper, inner in ((OptimizedModule, "_orig_mod"), (DistributedDataParallel, "module")):
        if isinstance(model, wrapper):
            model = getattr(model, inner)
    return model
