"""Batches of any type: how many samples, and some of them; and the model that takes them."""

import copy
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch._dynamo import OptimizedModule
from torch.nn.parallel import DistributedDataParallel


def size_of(batch: Any) -> int | None:
    """The number of samples in a batch: the first dimension of its first tensor that has any."""
    if isinstance(batch, Tensor):
        return len(batch) if batch.ndim else None
    if isinstance(batch, Mapping):
        batch = tuple(batch.values())
    if not isinstance(batch, (tuple, list)):
        return None
    return next((size for part in batch if (size := size_of(part)) is not None), None)


def select(batch: Any, index: slice | Tensor, size: int | None) -> Any:
    """Some samples of a batch: in new containers, all tensors whose first dimension is the number of samples.

    Args:
        batch: tensors in tuples, lists and mappings of any depth.
        index: which samples.
        size: how many the batch has.
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
    """The model inside of DistributedDataParallel and torch.compile, for a forward that they must not see."""
    for wrapper, inner in ((OptimizedModule, "_orig_mod"), (DistributedDataParallel, "module")):
        if isinstance(model, wrapper):
            model = getattr(model, inner)
    return model
