"""Efficient SAM (Du et al. 2022, arXiv 2110.03141)."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from composer_sassha.common import validate
from composer_sassha.common.rng import generator
from composer_sassha.common.tensors import unflatten
from composer_sassha.perturbations.base import (
    Ascent,
    Descent,
    Displacement,
    Perturbation,
    Point,
    Program,
    ratio,
)


@dataclass
class ESAMPerturbation(Perturbation):
    """Displaces a random fraction of the weights (stochastic weight perturbation, section 3.1 of the paper).

    Each entry of `e = rho * g / ||g||` is kept with probability beta and then divided by beta, so that the
    mean is SAM's e. The other half of the paper, the selection of samples for the second pass, is
    `most_sensitive`. In a Composer Trainer the algorithm `ESAM` does both.

    Args:
        rho: radius of the neighbourhood, >= 0. Default: 0.05.
        beta: fraction of the weights to displace, in (0, 1]. Default: 0.6.
        seed: with the step and the rank it determines the draws. Default: 0.

    Raises:
        TypeError, ValueError: an argument that is not allowed.

    Example:
        >>> from composer_sassha.perturbations.base import Gradient, displacement
        >>> w = torch.zeros(4)
        >>> esam = ESAMPerturbation(rho=0.5, beta=0.5)
        >>> displacement(esam, Point([w]), Gradient([w], [torch.ones(4)])).apply()
        >>> w
        tensor([0.5000, 0.0000, 0.0000, 0.5000])
    """

    rho: float = 0.05
    beta: float = 0.6
    seed: int = 0

    def validate(self) -> None:
        """Check the arguments; see `Perturbation`."""
        validate.number("ESAM", "rho", self.rho, low=0)
        validate.fraction("ESAM", "beta", self.beta)
        validate.integer("ESAM", "seed", self.seed, low=0)

    def step(self, at: Point) -> Program:
        """Yield both passes; which samples the second one has, the closure decides."""
        g = yield Ascent()
        norm = g.norm()
        at.metrics |= {"rho": self.rho, "grad_norm": norm}
        if g.tensors and self.beta < 1:
            # The key has the rank: each one displaces other weights, as each has another gradient.
            torch._foreach_mul_(g.tensors, bernoulli(g.tensors, self.beta, (self.seed, at.step, at.rank)))
        scale = ratio(self.rho / self.beta, norm, g.params)
        yield Descent(Displacement(g.params, g.tensors, scale, spare=True))
        return None


def bernoulli(like: Sequence[Tensor], probability: float, key: Sequence[int]) -> list[Tensor]:
    """Draw 1 with the given probability, else 0, for every entry; one draw serves all tensors.

    Args:
        like: at least one tensor; the result has their shapes, dtypes and devices.
        probability: of a 1, in [0, 1].
        key: integers that determine the draw.
    """
    device = like[0].device
    size = sum(t.numel() for t in like)
    kept = torch.rand(size, generator=generator(key, device), device=device) < probability
    return [mask.to(t) for mask, t in zip(unflatten(kept, like), like, strict=True)]


def most_sensitive(rise: Tensor, gamma: float) -> Tensor:
    """Return the sorted indices of the fraction gamma of samples whose loss rises most (section 3.2).

    Args:
        rise: each sample's loss at w + e minus its loss at w.
        gamma: the fraction, in (0, 1]; rounded up to whole samples.

    Example:
        >>> most_sensitive(torch.tensor([2.0, 0.0, -1.0, 1.0]), gamma=0.5)
        tensor([0, 3])
    """
    count = max(1, math.ceil(gamma * len(rise) - 1e-9))  # 0.07 * 100 is a little above 7 in binary
    return torch.topk(rise, count).indices.sort().values
