"""Update rules, and the wrapper that runs the passes of a step. Plain PyTorch."""

from composer_sassha.optim.passes import PassRunner
from composer_sassha.optim.sassha import SASSHA
from composer_sassha.optim.sharpness_aware import SharpnessAwareOptimizer

__all__ = ["SASSHA", "PassRunner", "SharpnessAwareOptimizer"]
