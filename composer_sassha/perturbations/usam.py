"""SAM without normalization (Andriushchenko and Flammarion 2022, arXiv 2206.06232)."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from composer_sassha.common import validate
from composer_sassha.common.tensors import global_norm
from composer_sassha.perturbations.base import Perturbation, Point
from composer_sassha.perturbations.ssam import renormalized


@dataclass
class USAMPerturbation(Perturbation):
    """Displaces by `e = rho * g`, so that the neighbourhood shrinks with the gradient.

    Args:
        rho: step along the gradient, >= 0. Default: 0.05.
        renormalize: rescale the gradient at w + e to the norm of the gradient at w, as stable SAM does
            (Tan et al. 2025). Default: False.

    Raises:
        TypeError, ValueError: an argument that is not allowed.

    Example:
        >>> w = torch.zeros(2)
        >>> USAMPerturbation(rho=0.1).displace(Point([w], [torch.tensor([3.0, 4.0])]))
        {'rho': 0.1, 'grad_norm': 5.0}
        >>> w
        tensor([0.3000, 0.4000])
    """

    rho: float = 0.05
    renormalize: bool = False

    def validate(self) -> None:
        """Check the arguments; see `Perturbation`."""
        validate.number("USAM", "rho", self.rho, low=0)
        self.mixes = validate.boolean("USAM", "renormalize", self.renormalize)

    def displace(self, point: Point) -> dict[str, float]:
        """Move the weights by e; see `Perturbation`."""
        norm = global_norm(point.grads, point.shards)
        if 0 < norm < math.inf:
            torch._foreach_add_(list(point.params), list(point.grads), alpha=self.rho)
        return {"rho": self.rho, "grad_norm": norm}

    def combine(
        self, ascent: Tensor, descent: Tensor, shards: ProcessGroup | None = None
    ) -> tuple[Tensor, None]:
        """Return the renormalized gradient; see `Perturbation`."""
        return renormalized(descent, ascent, shards), None
