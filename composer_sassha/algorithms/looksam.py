"""LookSAM as a Composer algorithm."""

from composer_sassha.algorithms.perturbing import PerturbingAlgorithm
from composer_sassha.perturbations import LookSAMPerturbation


class LookSAM(PerturbingAlgorithm):
    """Perturbs every `interval` steps and reuses the direction in between (Liu et al. 2022, 2203.02714).

    On a perturbed step, the part g_v of the gradient at w + e that is orthogonal to the gradient at w is kept
    in the optimizer's state (`looksam_g_v`, averaged over the ranks, saved with checkpoints). On the others
    the update is `g + alpha * ||g|| * g_v / ||g_v||`, at the cost of a plain step. Logs the metrics of `SAM`.

    Args:
        rho: radius of the neighbourhood, >= 0. Default: 0.1.
        alpha: weight of the kept direction, >= 0. Default: 0.7.
        interval: steps between perturbed steps (the paper's k), >= 1. Default: 5.
        sync_ascent: average both gradients over the ranks before they are combined. Default: False.

    Raises:
        TypeError, ValueError: an argument that is not allowed; at the Trainer's start, a combination that is
            not.

    Example:
        >>> LookSAM()
        LookSAM(rho=0.1, alpha=0.7, interval=5, sync_ascent=False)
    """

    def __init__(
        self, rho: float = 0.1, alpha: float = 0.7, interval: int = 5, sync_ascent: bool = False
    ) -> None:
        super().__init__(LookSAMPerturbation(rho, alpha), interval, sync_ascent)
