"""Where the gradient is taken: one file per method. Plain PyTorch."""

from composer_sassha.perturbations.base import Perturbation
from composer_sassha.perturbations.sam import SAMPerturbation

__all__ = ["Perturbation", "SAMPerturbation"]
