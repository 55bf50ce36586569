"""Surrogate gap guided sharpness-aware minimization (Zhuang et al. 2022, arXiv 2203.08065)."""

import math
from dataclasses import dataclass, field
from typing import Any

from torch.optim import Optimizer

from composer_sassha.common import validate
from composer_sassha.common.rates import fraction_of_largest_rate, largest_rate
from composer_sassha.common.tensors import inner_products
from composer_sassha.perturbations.base import Ascent, Descent, Perturbation, Point, Program


@dataclass
class GSAMPerturbation(Perturbation):
    """Displaces as SAM does, and lowers the surrogate gap `h = L(w + e) - L(w)` with the loss at w + e.

    The update is `g_p - alpha * g_orth` (algorithm 1): g_p is the gradient at w + e, and g_orth the part of
    the gradient at w that is orthogonal to it. The radius falls with the learning rate (section 4.2),

        rho_t = rho_min + (rho_max - rho_min) * (lr_t - lr_min) / (lr_max - lr_min)

    with the learning rate of the first parameter group, and the quotient clamped to [0, 1]. Without a
    scheduler the radius is rho_max.

    Args:
        rho_max: radius at the largest learning rate, >= 0. Default: 0.04.
        rho_min: radius at the smallest, in [0, rho_max]. Default: 0.02.
        alpha: weight of the orthogonal part, >= 0; 0 is SAM. Default: 0.01.
        lr_min: the learning rate at the end of its schedule, >= 0 and below lr_max. Default: 0.
        lr_max: the largest learning rate, for a scheduler that starts from a smaller one. Default: the
            group's `max_lr` (OneCycleLR sets it) or `initial_lr`.

    Raises:
        TypeError, ValueError: an argument that is not allowed.

    Example:
        >>> GSAMPerturbation(alpha=0.5)
        GSAMPerturbation(rho_max=0.04, rho_min=0.02, alpha=0.5, lr_min=0.0, lr_max=None)
    """

    mixes = True

    rho_max: float = 0.04
    rho_min: float = 0.02
    alpha: float = 0.01
    lr_min: float = 0.0
    lr_max: float | None = field(default=None, metadata={"fixed": True})
    rho: float = field(init=False, repr=False)  # of the latest step

    def __post_init__(self) -> None:
        """Start from rho_max."""
        super().__post_init__()
        self.rho = self.rho_max

    def validate(self) -> None:
        """Check the arguments; see `Perturbation`."""
        validate.number("GSAM", "rho_max", self.rho_max, low=0)
        validate.number("GSAM", "rho_min", self.rho_min, low=0)
        if self.rho_min > self.rho_max:
            raise ValueError(
                f"GSAM: rho_min={self.rho_min!r} is not allowed; it must be <= rho_max={self.rho_max!r}; "
                "lower rho_min or raise rho_max"
            )
        validate.number("GSAM", "alpha", self.alpha, low=0)
        validate.number("GSAM", "lr_min", self.lr_min, low=0)
        if self.lr_max is not None:
            validate.number("GSAM", "lr_max", self.lr_max, low=0)

    def step(self, at: Point) -> Program:
        """Yield both passes and return g_p - alpha * g_orth; see `Perturbation.step`."""
        self.rho = self.radius(at.group)
        g = yield Ascent(keeps=True)
        g_p = yield Descent(at.towards(g, self.rho))
        inner, norm = inner_products([(g.flat, g_p.flat), (g_p.flat, g_p.flat)], at.shards)
        if not (math.isfinite(inner) and 0 < norm < math.inf):
            return g_p.flat
        # g_orth = g - (<g, g_p> / ||g_p||^2) g_p
        return g_p.flat.mul_(1 + self.alpha * inner / norm).sub_(g.flat, alpha=self.alpha)

    def radius(self, group: Any) -> float:
        """Return rho_t for a parameter group with its `lr` and, if it has a schedule, `initial_lr`."""
        part = fraction_of_largest_rate(group, self.lr_min, self.lr_max)
        # Written as a weighted mean, which unlike rho_min + part * (...) is exact at both ends.
        return part * self.rho_max + (1 - part) * self.rho_min

    def check(self, optimizer: Optimizer) -> None:
        """Refuse an lr_min that is not below the initial learning rate; see `Perturbation`."""
        largest = self.lr_max or largest_rate(optimizer.param_groups[0])
        if 0 < largest <= self.lr_min:
            raise ValueError(
                f"GSAM: lr_min={self.lr_min!r} is not allowed; it must be below the optimizer's "
                f"initial learning rate, {largest!r}"
            )

    def metrics(self, loss_gap: Any) -> dict[str, Any]:
        """Return the surrogate gap h and the estimate 2 h / rho^2 of the largest eigenvalue."""
        eigenvalue = {"dominant_eigenvalue": 2 * loss_gap / self.rho**2} if self.rho else {}
        return {"loss_gap": loss_gap, **eigenvalue}
