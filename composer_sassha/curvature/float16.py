"""Normalization in float32, for second derivatives of a model that computes in float16."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from composer_sassha.common.replaced import replaced

# The functions behind torch.nn's normalizations over samples or pixels. On a GPU, autocast already runs all
# other normalizations in float32.
_NORMS = ("batch_norm", "instance_norm")


class NormsInFloat32:
    """Makes batch and instance normalization of float16 inputs compute in float32, within its context.

    Their second derivative sums squares of activations over pixels in the dtype of the input. The sum
    overflows float16 at any scale of the loss.

    Example:
        >>> x = torch.full((2, 1), 3.0, dtype=torch.float16)
        >>> with NormsInFloat32():
        ...     torch.nn.BatchNorm1d(1)(x).dtype
        torch.float16
    """

    # The functions themselves are replaced, since a TorchFunctionMode does not see what an activation
    # checkpoint recomputes within autograd.

    def __enter__(self) -> None:
        self._replaced = replaced((torch, name, _in_float32) for name in _NORMS)
        self._replaced.__enter__()

    def __exit__(self, *_: object) -> None:
        self._replaced.__exit__(None, None, None)


def _in_float32(norm: Callable[..., Tensor]) -> Callable[..., Tensor]:
    @functools.wraps(norm)
    def wrapped(input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        others = [given for given in (*args, *kwargs.values()) if isinstance(given, Tensor)]
        if input.dtype != torch.float16 or any(other.dtype != torch.float32 for other in others):
            return norm(input, *args, **kwargs)
        return norm(input.float(), *args, **kwargs).half()

    return wrapped
