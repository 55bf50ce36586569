"""The method that makes an optimizer a second-order one."""

from collections.abc import Mapping
from typing import Protocol, TypeGuard

from torch import Tensor
from torch.optim import Optimizer


class TakesCurvature(Protocol):
    """Any optimizer with a method `update_curvature`, of this package or not."""

    def update_curvature(self, diagonal: Mapping[Tensor, Tensor]) -> None:
        """Average a fresh estimate of the Hessian's diagonal into the state; see `SecondOrderOptimizer`."""


def takes_curvature(optimizer: Optimizer) -> TypeGuard[TakesCurvature]:
    """Whether an optimizer takes estimates of the Hessian's diagonal.

    Its method `update_curvature` decides, not its class, so that any optimizer can offer it.

    Example:
        >>> import torch
        >>> takes_curvature(torch.optim.SGD([torch.zeros(1)]))
        False
    """
    return hasattr(optimizer, "update_curvature")
