"""SAM without normalization (Andriushchenko and Flammarion 2022, arXiv 2206.06232)."""

from dataclasses import dataclass

from composer_sassha.common import validate
from composer_sassha.perturbations.base import (
    Ascent,
    Descent,
    Displacement,
    Perturbation,
    Point,
    Program,
    guarded,
)
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
        >>> import torch
        >>> from composer_sassha.perturbations.base import Gradient, displacement
        >>> w = torch.zeros(2)
        >>> g = Gradient([w], [torch.tensor([3.0, 4.0])])
        >>> displacement(USAMPerturbation(rho=0.1), Point([w]), g).apply()
        >>> w
        tensor([0.3000, 0.4000])
    """

    rho: float = 0.05
    renormalize: bool = False

    def validate(self) -> None:
        """Check the arguments; see `Perturbation`."""
        validate.number("USAM", "rho", self.rho, low=0)
        self.mixes = validate.boolean("USAM", "renormalize", self.renormalize)

    def step(self, at: Point) -> Program:
        """Yield both passes, and return the renormalized gradient if that is asked for."""
        g = yield Ascent(keeps=self.renormalize)
        norm = g.norm()
        at.metrics |= {"rho": self.rho, "grad_norm": norm}
        scale = guarded(self.rho, norm)
        g_p = yield Descent(Displacement(g.params, g.tensors, scale, spare=True))
        return renormalized(g_p.flat, g.flat, at.shards) if self.renormalize else None
