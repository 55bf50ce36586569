"""LookSAM (Liu et al. 2022, arXiv 2203.02714)."""

import math
from dataclasses import dataclass

import torch

from composer_sassha.common import validate
from composer_sassha.common.tensors import euclidean_norms, inner_products
from composer_sassha.perturbations.base import Ascent, Descent, Perturbation, Point, Program


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
        >>> LookSAMPerturbation(alpha=0.5)
        LookSAMPerturbation(rho=0.1, alpha=0.5)
    """

    mixes = True
    remembers = "looksam_g_v"

    rho: float = 0.1
    alpha: float = 0.7

    def validate(self) -> None:
        """Check the arguments; see `Perturbation`."""
        validate.number("LookSAM", "rho", self.rho, low=0)
        validate.number("LookSAM", "alpha", self.alpha, low=0)

    def step(self, at: Point) -> Program:
        """Yield both passes, return g_s, and remember g_v; see `Perturbation.step`."""
        g = yield Ascent(keeps=True)
        g_s = yield Descent(at.towards(g, self.rho))
        inner, norm = inner_products([(g.flat, g_s.flat), (g.flat, g.flat)], at.shards)
        if math.isfinite(inner) and 0 < norm < math.inf:
            at.memory[self.remembers] = g_s.flat.sub(g.flat, alpha=inner / norm)
        else:  # there is no direction to be orthogonal to
            at.memory[self.remembers] = torch.zeros_like(g_s.flat)
        return g_s.flat

    def between(self, at: Point) -> Program:
        """Yield one pass and return `g + alpha * ||g|| * g_v / ||g_v||`; see `Perturbation.between`."""
        g = yield Descent()
        g_v = at.memory[self.remembers]
        norm, kept = euclidean_norms([g.flat, g_v], at.shards)
        if not (math.isfinite(norm) and 0 < kept < math.inf):
            return g.flat
        return g.flat.add_(g_v, alpha=self.alpha * norm / kept)
