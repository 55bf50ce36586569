"""What a perturbation is."""

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor


@runtime_checkable
class Perturbation(Protocol):
    """Displaces the weights before the gradient that updates them is taken."""

    def displace(self, params: Sequence[Tensor], grads: Sequence[Tensor]) -> dict[str, float]:
        """Move `params` in place by e, given the gradient at w.

        Whoever calls this keeps w and puts it back. A gradient whose norm is zero or not finite displaces by
        nothing.

        Args:
            params: the parameters that have a gradient.
            grads: their gradients at w, free to be overwritten.

        Returns:
            What to log about the displacement, by name.
        """
        ...


def global_norm(tensors: Sequence[Tensor]) -> float:
    """Return the Euclidean norm over all tensors together, accumulated in at least float32.

    Example:
        >>> global_norm([torch.tensor([3.0]), torch.tensor([[4.0]])])
        5.0
    """
    if not tensors:
        return 0.0
    wide = torch.promote_types(tensors[0].dtype, torch.float32)
    norms = torch._foreach_norm(list(tensors), 2, dtype=wide)
    return torch.linalg.vector_norm(torch.stack([norm.to(norms[0].device) for norm in norms])).item()
