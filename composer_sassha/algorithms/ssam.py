"""Stable SAM as a Composer algorithm."""

from composer_sassha.algorithms.perturbing import PerturbingAlgorithm
from composer_sassha.perturbations import SSAMPerturbation


class SSAM(PerturbingAlgorithm):
    """Perturbs as SAM does, with the update rescaled to the norm of the gradient at w (Tan et al. 2025).

    Stable SAM, JMLR, arXiv 2401.07250. The gradient at w + e is multiplied by `||g(w)|| / ||g(w + e)||`. Each
    rank does so with its own two gradients, and the result is averaged in one collective. Logs the metrics of
    `SAM`.

    Args:
        rho: radius of the neighbourhood, >= 0. Default: 0.05.
        interval: steps between perturbed steps, >= 1. Default: 1.
        sync_ascent: average both gradients over the ranks before they are combined. Default: False.

    Raises:
        TypeError, ValueError: an argument that is not allowed; at the Trainer's start, a combination that is
            not.

    Example:
        >>> SSAM()
        SSAM(rho=0.05, interval=1, sync_ascent=False)
    """

    def __init__(self, rho: float = 0.05, interval: int = 1, sync_ascent: bool = False) -> None:
        super().__init__(SSAMPerturbation(rho), interval, sync_ascent)
