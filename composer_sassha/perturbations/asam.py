"""Adaptive sharpness-aware minimization (Kwon et al. 2021, arXiv 2102.11600)."""

from dataclasses import dataclass

import torch

from composer_sassha.common import validate
from composer_sassha.common.sharding import local
from composer_sassha.perturbations.base import (
    Ascent,
    Descent,
    Displacement,
    Gradient,
    Perturbation,
    Point,
    Program,
)


@dataclass
class ASAMPerturbation(Perturbation):
    """Displaces by `e = rho * T^2 g / ||T g||`: a neighbourhood that scales with the weights.

    T is diagonal: `|w| + eta` for parameters whose name contains `weight`, as in the authors' code, and 1 for
    all others (equation 9 of the paper, p = 2).

    Args:
        rho: radius of the neighbourhood, >= 0. Default: 0.5.
        eta: added to `|w|`, so that weights near zero are displaced too, >= 0. Default: 0.01.

    Raises:
        TypeError, ValueError: an argument that is not allowed.

    Example:
        >>> from composer_sassha.perturbations.base import Gradient, displacement
        >>> w = torch.tensor([3.0, -1.0])
        >>> at = Point([w], name_of=lambda p: "head.weight")
        >>> g = Gradient([w], [torch.tensor([1.0, 4.0])])
        >>> displacement(ASAMPerturbation(rho=0.5, eta=0.0), at, g).apply()
        >>> w  # e = 0.5 * [9 * 1, 1 * 4] / 5
        tensor([ 3.9000, -0.6000])
    """

    rho: float = 0.5
    eta: float = 0.01

    def validate(self) -> None:
        """Check the arguments; see `Perturbation`."""
        validate.number("ASAM", "rho", self.rho, low=0)
        validate.number("ASAM", "eta", self.eta, low=0)

    def step(self, at: Point) -> Program:
        """Yield both passes; see `Perturbation.step`. The norm that is logged is that of T g.

        Raises:
            RuntimeError: the parameters have no names.
        """
        g = yield Ascent()
        yield Descent(self._displacement(at, g))
        return None

    def _displacement(self, at: Point, g: Gradient) -> Displacement:
        names = [at.name_of(p) for p in g.params]
        if None in names:
            raise RuntimeError(
                "ASAM needs the parameters' names; give the wrapper named_parameters=model.named_parameters()"
            )
        weights = [i for i, name in enumerate(names) if name is not None and "weight" in name]
        scaled, params = [g.tensors[i] for i in weights], local(g.params)
        scales = list(torch._foreach_abs([params[i] for i in weights])) if weights else []
        if weights:
            torch._foreach_add_(scales, self.eta)
            torch._foreach_mul_(scaled, scales)
        e = at.towards(g, self.rho)
        if weights:
            torch._foreach_mul_(scaled, scales)
        return e
