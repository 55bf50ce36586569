"""What a second derivative in float16 compute needs beside a scale."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

# Where torch.nn's normalisations over samples or pixels end up. On a GPU, autocast has the others in float32.
_NORMS = ("batch_norm", "instance_norm")


class NormsInFloat32:
    """Within this context, batch and instance normalisation of float16 inputs compute in float32.

    Their second derivative sums squares of activations over pixels, in the dtype of the input: more than
    float16 can hold, at any scale of the loss.

    Example:
        >>> x = torch.full((2, 1), 3.0, dtype=torch.float16)
        >>> with NormsInFloat32():
        ...     torch.nn.BatchNorm1d(1)(x).dtype
        torch.float16
    """

    # The functions themselves are replaced: what an activation checkpoint computes again, within autograd, a
    # TorchFunctionMode does not see.

    def __enter__(self) -> None:
        self._replaced = {name: getattr(torch, name) for name in _NORMS}
        for name, norm in self._replaced.items():
            setattr(torch, name, _in_float32(norm))

    def __exit__(self, *_: object) -> None:
        for name, norm in self._replaced.items():
            setattr(torch, name, norm)


def _in_float32(norm: Callable[..., Tensor]) -> Callable[..., Tensor]:
    @functools.wraps(norm)
    def wrapped(input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        others = [given for given in (*args, *kwargs.values()) if isinstance(given, Tensor)]
        if input.dtype != torch.float16 or any(other.dtype != torch.float32 for other in others):
            return norm(input, *args, **kwargs)
        return norm(input.float(), *args, **kwargs).half()

    return wrapped
