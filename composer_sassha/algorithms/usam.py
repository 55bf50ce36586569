"""SAM without normalization as a Composer algorithm."""

from composer_sassha.algorithms.perturbing import PerturbingAlgorithm
from composer_sassha.perturbations import USAMPerturbation


class USAM(PerturbingAlgorithm):
    """Takes the gradient at `w + rho * g` (Andriushchenko and Flammarion 2022, arXiv 2206.06232).

    With `renormalize`, the update is rescaled to the norm of the gradient at w, as in `SSAM`. All else,
    metrics included, is as in `SAM`.

    Args:
        rho: step along the gradient, >= 0. Default: 0.05.
        renormalize: multiply the gradient at w + e by `||g(w)|| / ||g(w + e)||`. Default: False.
        interval: steps between perturbed steps, >= 1. Default: 1.
        sync_ascent: average the gradient at w over the ranks. Default: False.

    Raises:
        TypeError, ValueError: an argument that is not allowed; at the Trainer's start, a combination that is
            not.

    Example:
        >>> USAM(rho=0.1)
        USAM(rho=0.1, renormalize=False, interval=1, sync_ascent=False)
    """

    def __init__(
        self,
        rho: float = 0.05,
        renormalize: bool = False,
        interval: int = 1,
        sync_ascent: bool = False,
    ) -> None:
        super().__init__(USAMPerturbation(rho, renormalize), interval, sync_ascent)
