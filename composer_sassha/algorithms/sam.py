"""Sharpness-aware minimization as a Composer algorithm."""

from typing import Any

from composer_sassha.algorithms.perturbing import PerturbingAlgorithm
from composer_sassha.perturbations import SAMPerturbation


class SAM(PerturbingAlgorithm):
    """Takes the gradient at `w + rho * g / ||g||` (Foret et al. 2021, arXiv 2010.01412); any optimizer.

    Every `interval` steps, a first pass gives g(w), and a second pass the gradient at the displaced weights,
    with which the optimizer updates w. BatchNorm statistics, metrics and the logged loss are those of the
    first pass, and both passes draw the same random numbers. Each rank perturbs along its own gradient unless
    `sync_ascent` is set. The optimizer is wrapped on BEFORE_LOAD, so that its state is resumed exactly.

    Logs `sharpness/rho`, `sharpness/grad_norm` (at w) and `sharpness/loss_gap` (the loss at w + e minus that
    at w), all of rank 0.

    Args:
        rho: radius of the neighbourhood, >= 0. Default: 0.05.
        interval: steps between perturbed steps, >= 1. Default: 1.
        sync_ascent: average the first gradient over the ranks too, at the cost of one more collective.
            Default: False.
        p: the norm of the neighbourhood, 2, or inf for `e = rho * sign(g)`. Default: 2.
        ascent_fraction: the fraction of each microbatch, its first samples, that gives g(w), in (0, 1],
            rounded up to at least two samples. Below 1, the statistics, metrics and loss are those of the
            second pass, which has all samples, and `sharpness/loss_gap` is not logged. Default: 1.

    Raises:
        TypeError, ValueError: an argument that is not allowed; at the Trainer's start, a combination that is
            not.

    Example:
        >>> SAM(rho=0.1)
        SAM(rho=0.1, interval=1, sync_ascent=False, p=2, ascent_fraction=1.0)
    """

    def __init__(
        self,
        rho: float = 0.05,
        interval: int = 1,
        sync_ascent: bool = False,
        p: float = 2,
        ascent_fraction: float = 1.0,
    ) -> None:
        super().__init__(SAMPerturbation(rho, p), interval, sync_ascent, ascent_fraction)

    def settings(self) -> dict[str, Any]:
        """Return the arguments of the constructor, for `repr`."""
        return {**super().settings(), "ascent_fraction": self.ascent_fraction}
