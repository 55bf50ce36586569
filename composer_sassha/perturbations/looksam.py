"""LookSAM (Liu et al. 2022, arXiv 2203.02714)."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from composer_sassha.common import validate
from composer_sassha.common.tensors import euclidean_norms, inner_products
from composer_sassha.perturbations.base import Perturbation, Point
from composer_sassha.perturbations.sam import SAMPerturbation


@dataclass
class LookSAMPerturbation(Perturbation):
    """Perturbs as SAM does on some steps, and reuses their direction towards flatness on the others.

    On a perturbed step the update is g_s, the gradient at w + e, and its part orthogonal to the gradient g at
    w is kept: `g_v = g_s - (<g, g_s> / ||g||^2) g`. On the others it is `g + alpha * ||g|| * g_v / ||g_v||`
    (algorithm 1). The wrapper's `interval` sets the number of steps in between.

    Args:
        rho: radius of the neighbourhood, >= 0. Default: 0.1.
        alpha: weight of the kept direction, >= 0. Default: 0.7.

    Raises:
        TypeError, ValueError: an argument that is not allowed.

    Example:
        >>> looksam = LookSAMPerturbation(alpha=0.5)
        >>> looksam.combine(ascent=torch.tensor([2.0, 0.0]), descent=torch.tensor([3.0, 4.0]))
        (tensor([3., 4.]), tensor([0., 4.]))
        >>> looksam.reuse(torch.tensor([2.0, 0.0]), remembered=torch.tensor([0.0, 4.0]))
        tensor([2., 1.])
    """

    mixes = True
    remembers = "looksam_g_v"

    rho: float = 0.1
    alpha: float = 0.7

    def validate(self) -> None:
        """Check the arguments; see `Perturbation`."""
        validate.number("LookSAM", "rho", self.rho, low=0)
        validate.number("LookSAM", "alpha", self.alpha, low=0)

    def displace(self, point: Point) -> dict[str, float]:
        """Move the weights by e; see `Perturbation`."""
        return SAMPerturbation(self.rho).displace(point)

    def combine(
        self, ascent: Tensor, descent: Tensor, shards: ProcessGroup | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return g_s and g_v; see `Perturbation`."""
        inner, norm = inner_products([(ascent, descent), (ascent, ascent)], shards)
        if not (math.isfinite(inner) and 0 < norm < math.inf):
            return descent, torch.zeros_like(descent)  # a zero ascent gradient has no direction
        return descent, descent.sub(ascent, alpha=inner / norm)

    def reuse(self, grad: Tensor, remembered: Tensor, shards: ProcessGroup | None = None) -> Tensor:
        """Return `g + alpha * ||g|| * g_v / ||g_v||`; see `Perturbation`."""
        norm, kept = euclidean_norms([grad, remembered], shards)
        if not (math.isfinite(norm) and 0 < kept < math.inf):
            return grad
        return grad.add_(remembered, alpha=self.alpha * norm / kept)
