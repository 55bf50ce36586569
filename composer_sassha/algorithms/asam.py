"""Adaptive SAM as a Composer algorithm."""

from composer_sassha.algorithms.perturbing import PerturbingAlgorithm
from composer_sassha.perturbations import ASAMPerturbation


class ASAM(PerturbingAlgorithm):
    """Perturbs in a neighbourhood that scales with the weights (Kwon et al. 2021, arXiv 2102.11600).

    The displacement is `e = rho * T^2 g / ||T g||`, T = `|w| + eta` for parameters whose name contains
    `weight`, 1 for the others. All else is as in `SAM`. The metrics are the same, with the norm of T g as
    `sharpness/grad_norm`.

    Args:
        rho: radius of the neighbourhood, >= 0. Default: 0.5.
        eta: added to `|w|`, so that weights near zero are displaced too, >= 0. Default: 0.01.
        interval: steps between perturbed steps, >= 1. Default: 1.
        sync_ascent: average the gradient at w over the ranks. Default: False.

    Raises:
        TypeError, ValueError: an argument that is not allowed; at the Trainer's start, a combination that is
            not.

    Example:
        >>> ASAM(rho=1.0)
        ASAM(rho=1.0, eta=0.01, interval=1, sync_ascent=False)
    """

    def __init__(
        self, rho: float = 0.5, eta: float = 0.01, interval: int = 1, sync_ascent: bool = False
    ) -> None:
        super().__init__(ASAMPerturbation(rho, eta), interval, sync_ascent)
