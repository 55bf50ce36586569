"""Momentum-SAM as a Composer algorithm."""

from composer_sassha.algorithms.perturbing import PerturbingAlgorithm
from composer_sassha.perturbations import MSAMPerturbation


class MSAM(PerturbingAlgorithm):
    """Takes the gradient at `w - rho * m / ||m||`, m the optimizer's momentum (Becker et al. 2024).

    Momentum-SAM, arXiv 2401.12033. A step has one pass and costs as much as a plain one. Around AdamW this is
    AdamW-MSAM; around SASSHA, with `LazyHessian`, it is M-SASSHA (`MSassha` is both in one). The weights are
    displaced only inside the step: evaluation, checkpoints and exports see w. The training loss, metrics and
    BatchNorm statistics are those at the displaced weights, since there is no other pass. The first step has
    no momentum yet and is a plain one.

    Logs `sharpness/rho` and `sharpness/momentum_norm`.

    Args:
        rho: length of the displacement, >= 0. Default: 3.
        interval: steps between perturbed steps, >= 1. Default: 1.

    Raises:
        TypeError, ValueError: an argument that is not allowed; at the Trainer's start, a combination that is
            not, such as an optimizer without momentum.

    Example:
        >>> MSAM(rho=1.0)
        MSAM(rho=1.0, interval=1)
    """

    def __init__(self, rho: float = 3.0, interval: int = 1) -> None:
        super().__init__(MSAMPerturbation(rho), interval, sync_ascent=None)
