"""Adaptive sharpness-aware minimization (Kwon et al. 2021, arXiv 2102.11600)."""

from dataclasses import dataclass

import torch

from composer_sassha.common import validate
from composer_sassha.common.tensors import global_norm
from composer_sassha.perturbations.base import Perturbation, Point, ratio


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
        >>> w = torch.tensor([3.0, -1.0])
        >>> point = Point([w], [torch.tensor([1.0, 4.0])], names=["head.weight"])
        >>> ASAMPerturbation(rho=0.5, eta=0.0).displace(point)
        {'rho': 0.5, 'grad_norm': 5.0}
        >>> w  # e = 0.5 * [9 * 1, 1 * 4] / 5
        tensor([ 3.9000, -0.6000])
    """

    names = True

    rho: float = 0.5
    eta: float = 0.01

    def validate(self) -> None:
        """Check the arguments; see `Perturbation`."""
        validate.number("ASAM", "rho", self.rho, low=0)
        validate.number("ASAM", "eta", self.eta, low=0)

    def displace(self, point: Point) -> dict[str, float]:
        """Move the weights by e; see `Perturbation`. The logged norm is that of T g.

        Raises:
            RuntimeError: the parameters have no names.
        """
        if point.params and not point.names:
            raise RuntimeError(
                "ASAM needs the parameters' names; give the wrapper named_parameters=model.named_parameters()"
            )
        scaled = [i for i, name in enumerate(point.names) if "weight" in name]
        grads = list(point.grads)
        if scaled:
            scales = torch._foreach_abs([point.params[i] for i in scaled])
            torch._foreach_add_(scales, self.eta)
            torch._foreach_mul_([grads[i] for i in scaled], scales)
        norm = global_norm(grads, point.shards)
        if scale := ratio(self.rho, norm, point.params):
            if scaled:
                torch._foreach_mul_([grads[i] for i in scaled], scales)
            torch._foreach_add_(list(point.params), grads, alpha=scale)
        return {"rho": self.rho, "grad_norm": norm}
