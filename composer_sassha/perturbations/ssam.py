"""Stable SAM (Tan et al. 2025, JMLR, arXiv 2401.07250)."""

import math
from dataclasses import dataclass

from torch import Tensor
from torch.distributed import ProcessGroup

from composer_sassha.common import validate
from composer_sassha.common.tensors import euclidean_norms
from composer_sassha.perturbations.base import Ascent, Descent, Perturbation, Point, Program


@dataclass
class SSAMPerturbation(Perturbation):
    """Displaces as SAM does, and rescales the gradient at w + e to the norm of the gradient at w.

    The update is `(||g|| / ||g_p||) * g_p`, with g_p the gradient at w + e.

    Args:
        rho: radius of the neighbourhood, >= 0. Default: 0.05.

    Raises:
        TypeError, ValueError: `rho` is not a finite number >= 0.

    Example:
        >>> SSAMPerturbation(rho=0.1)
        SSAMPerturbation(rho=0.1)
    """

    mixes = True

    rho: float = 0.05

    def validate(self) -> None:
        """Check the arguments; see `Perturbation`."""
        validate.number("SSAM", "rho", self.rho, low=0)

    def step(self, at: Point) -> Program:
        """Yield both passes and return the renormalized gradient; see `Perturbation.step`."""
        g = yield Ascent(keeps=True)
        g_p = yield Descent(at.towards(g, self.rho))
        return renormalized(g_p.flat, g.flat, at.shards)


def renormalized(vector: Tensor, like: Tensor, shards: ProcessGroup | None = None) -> Tensor:
    """Rescale `vector`, in place, to the norm of `like`; leave it where that is impossible."""
    target, norm = euclidean_norms([like, vector], shards)
    return vector.mul_(target / norm) if math.isfinite(target) and 0 < norm < math.inf else vector
