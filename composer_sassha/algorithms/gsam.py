"""GSAM as a Composer algorithm."""

from composer_sassha.algorithms.perturbing import PerturbingAlgorithm
from composer_sassha.perturbations import GSAMPerturbation


class GSAM(PerturbingAlgorithm):
    """Perturbs as SAM does, and lowers the surrogate gap `L(w + e) - L(w)` (Zhuang et al. 2022).

    GSAM, arXiv 2203.08065. The update is the gradient at w + e minus alpha times the part of the gradient at
    w that is orthogonal to it. The radius falls with the learning rate, from rho_max to rho_min. Each rank
    combines its own two gradients, and the result is averaged in one collective.

    Logs the metrics of `SAM`, and `sharpness/dominant_eigenvalue`, the estimate `2 h / rho^2` of the
    Hessian's largest eigenvalue from the surrogate gap h (`sharpness/loss_gap`).

    Args:
        rho_max: radius at the largest learning rate, >= 0. Default: 0.04.
        rho_min: radius at the smallest, in [0, rho_max]. Default: 0.02.
        alpha: weight of the orthogonal part, >= 0. Default: 0.01.
        lr_min: the learning rate at the end of its schedule, >= 0 and below that at the start. Default: 0.
        interval: steps between perturbed steps, >= 1. Default: 1.
        sync_ascent: average both gradients over the ranks before they are combined. Default: False.
        lr_max: the largest learning rate, for a scheduler that starts from a smaller one. Default: what the
            first parameter group has as `max_lr` (OneCycleLR) or `initial_lr`.

    Raises:
        TypeError, ValueError: an argument that is not allowed; at the Trainer's start, a combination that is
            not.

    Example:
        >>> GSAM(rho_max=0.1, alpha=0.2)
        GSAM(rho_max=0.1, rho_min=0.02, alpha=0.2, lr_min=0.0, interval=1, sync_ascent=False, lr_max=None)
    """

    def __init__(
        self,
        rho_max: float = 0.04,
        rho_min: float = 0.02,
        alpha: float = 0.01,
        lr_min: float = 0.0,
        interval: int = 1,
        sync_ascent: bool = False,
        lr_max: float | None = None,
    ) -> None:
        super().__init__(GSAMPerturbation(rho_max, rho_min, alpha, lr_min, lr_max), interval, sync_ascent)
