"""Perturbations: where a method takes its gradient and how it forms the update. Plain PyTorch."""

from composer_sassha.perturbations.asam import ASAMPerturbation
from composer_sassha.perturbations.base import Perturbation, Point
from composer_sassha.perturbations.esam import ESAMPerturbation
from composer_sassha.perturbations.gsam import GSAMPerturbation
from composer_sassha.perturbations.looksam import LookSAMPerturbation
from composer_sassha.perturbations.msam import MSAMPerturbation
from composer_sassha.perturbations.sam import SAMPerturbation
from composer_sassha.perturbations.ssam import SSAMPerturbation
from composer_sassha.perturbations.usam import USAMPerturbation

__all__ = [
    "ASAMPerturbation",
    "ESAMPerturbation",
    "GSAMPerturbation",
    "LookSAMPerturbation",
    "MSAMPerturbation",
    "Perturbation",
    "Point",
    "SAMPerturbation",
    "SSAMPerturbation",
    "USAMPerturbation",
]
