"""Second-order update rules, and the wrapper that runs the passes of a step. Plain PyTorch."""

from composer_sassha.optim.adahessian import AdaHessian
from composer_sassha.optim.passes import PassRunner
from composer_sassha.optim.protocols import TakesCurvature, takes_curvature
from composer_sassha.optim.sassha import SASSHA
from composer_sassha.optim.sharpness_aware import SharpnessAwareOptimizer
from composer_sassha.optim.sophia import Sophia

__all__ = [
    "SASSHA",
    "AdaHessian",
    "PassRunner",
    "SharpnessAwareOptimizer",
    "Sophia",
    "TakesCurvature",
    "takes_curvature",
]
