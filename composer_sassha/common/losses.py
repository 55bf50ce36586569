"""Losses of any type that a model may return: a tensor, a sequence of tensors or a mapping."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor


def total_loss(loss: Any) -> Tensor:
    """Return the one number that Composer's Trainer differentiates.

    Args:
        loss: a tensor, or a sequence or a mapping of tensors; a mapping's entry `total` wins.

    Example:
        >>> import torch
        >>> total_loss({"a": torch.tensor([1.0, 3.0]), "b": torch.tensor(1.0)})
        tensor(3.)
    """
    if isinstance(loss, Mapping) and "total" in loss:
        return loss["total"]
    parts = (
        loss.values() if isinstance(loss, Mapping) else loss if isinstance(loss, (tuple, list)) else (loss,)
    )
    first, *others = [part.mean() for part in parts]
    return sum(others, start=first)
