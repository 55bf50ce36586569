"""What a perturbation is."""

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

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
