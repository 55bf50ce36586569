"""Sharpness-aware minimization (Foret et al. 2021, arXiv 2010.01412)."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from composer_sassha import _validate
from composer_sassha._tensors import global_norm


@dataclass
class SAMPerturbation:
    """Displaces by `e = rho * g / ||g||`, with one norm over all parameters (equation 2 of the paper, p = 2).

    Args:
        rho: radius of the neighbourhood, >= 0. Default: 0.05.

    Raises:
        TypeError, ValueError: `rho` is not a finite number >= 0.

    Example:
        >>> w = torch.zeros(2)
        >>> SAMPerturbation(rho=0.5).displace([w], [torch.tensor([3.0, 4.0])])
        {'rho': 0.5, 'grad_norm': 5.0}
        >>> w
        tensor([0.3000, 0.4000])
    """

    rho: float = 0.05

    def __post_init__(self) -> None:
        _validate.number("SAM", "rho", self.rho, low=0)

    def displace(self, params: Sequence[Tensor], grads: Sequence[Tensor]) -> dict[str, float]:
        """Move `params` in place by e; see `Perturbation`."""
        norm = global_norm(grads)
        if 0 < norm < math.inf:
            torch._foreach_add_(list(params), list(grads), alpha=self.rho / norm)
        return {"rho": self.rho, "grad_norm": norm}
