"""What an optimizer must have to be handed a Hessian estimate."""

from collections.abc import Mapping
from typing import Protocol, TypeGuard

from torch import Tensor
from torch.optim import Optimizer


class TakesCurvature(Protocol):
    """An optimizer with `update_curvature`, be it one of this package's or another's."""

    def update_curvature(self, diagonal: Mapping[Tensor, Tensor]) -> None:
        """Average a fresh estimate of the Hessian's diagonal into the state; see `SecondOrderOptimizer`."""


def takes_curvature(optimizer: Optimizer) -> TypeGuard[TakesCurvature]:
    """Whether an optimizer can be handed estimates of the Hessian's diagonal.

    The method `update_curvature` decides, not the class: any optimizer may offer it.

    Example:
        >>> import torch
        >>> takes_curvature(torch.optim.SGD([torch.zeros(1)]))
        False
    """
    return hasattr(optimizer, "update_curvature")
