"""Losses of any type that a model may return: a tensor, a sequence or a mapping of tensors."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor


def total_loss(loss: Any) -> Tensor:
    """Return the one number that Composer's Trainer differentiates.

    Args:
        loss: a tensor, or a sequence or a mapping of tensors. A mapping with an entry `total` has its total
            there; otherwise the means of the parts are added up.

    Example:
        >>> import torch
        >>> total_loss({"a": torch.tensor([1.0, 3.0]), "b": torch.tensor(1.0)})
        tensor(3.)
    """
    if isinstance(loss, Mapping) and "total" in loss:
        total: Tensor = loss["total"]
        return total
    if isinstance(loss, Mapping):
        loss = loss.values()
    elif not isinstance(loss, (tuple, list)):
        loss = (loss,)
    means: list[Tensor] = [part.mean() for part in loss]
    return sum(means[1:], start=means[0])
