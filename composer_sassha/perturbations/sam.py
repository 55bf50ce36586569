"""Sharpness-aware minimization (Foret et al. 2021, arXiv 2010.01412)."""

import math
from dataclasses import dataclass, field

import torch

from composer_sassha.common import validate
from composer_sassha.perturbations.base import Ascent, Descent, Perturbation, Point, Program, guarded


@dataclass
class SAMPerturbation(Perturbation):
    """Displaces by the e in a p-norm ball of radius rho that, to first order, raises the loss most.

    With p = 2, `e = rho * g / ||g||` with one norm over all parameters (equation 2 of the paper); with
    p = inf, `e = rho * sign(g)` (appendix C.5).

    Args:
        rho: radius of the neighbourhood, >= 0. Default: 0.05.
        p: the norm of the neighbourhood, 2 or inf. Default: 2.

    Raises:
        TypeError, ValueError: an argument that is not allowed.

    Example:
        >>> from composer_sassha.perturbations.base import Gradient, displacement
        >>> w = torch.zeros(2)
        >>> g = Gradient([w], [torch.tensor([3.0, 4.0])])
        >>> displacement(SAMPerturbation(rho=0.5), Point([w]), g).apply()
        >>> w
        tensor([0.3000, 0.4000])
    """

    rho: float = 0.05
    p: float = field(default=2, metadata={"fixed": True})  # not schedulable

    def validate(self) -> None:
        """Check the arguments; see `Perturbation`."""
        validate.number("SAM", "rho", self.rho, low=0)
        if self.p not in (2, math.inf) or isinstance(self.p, bool):
            raise ValueError(f"SAM: p={self.p!r} is not allowed; it must be 2 or inf")

    def step(self, at: Point) -> Program:
        """Yield SAM's two passes; see `Perturbation.step`."""
        g = yield Ascent()
        e = at.towards(g, self.rho)
        if self.p == math.inf and g.tensors:
            torch._foreach_sign_(g.tensors)
            e.scale = guarded(self.rho, at.metrics["grad_norm"])
        yield Descent(e)
        return None
