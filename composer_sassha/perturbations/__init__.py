"""Perturbations: where a method takes its gradient and how it forms the update. Plain PyTorch."""

from composer_sassha.perturbations.asam import ASAMPerturbation
from composer_sassha.perturbations.base import (
    Ascent,
    Descent,
    Displacement,
    Gradient,
    Pass,
    Perturbation,
    Point,
    Program,
    unperturbed,
)
from composer_sassha.perturbations.esam import ESAMPerturbation
from composer_sassha.perturbations.gsam import GSAMPerturbation
from composer_sassha.perturbations.looksam import LookSAMPerturbation
from composer_sassha.perturbations.msam import MSAMPerturbation
from composer_sassha.perturbations.sam import SAMPerturbation
from composer_sassha.perturbations.ssam import SSAMPerturbation
from composer_sassha.perturbations.usam import USAMPerturbation

__all__ = [
    "ASAMPerturbation",
    "Ascent",
    "Descent",
    "Displacement",
    "ESAMPerturbation",
    "GSAMPerturbation",
    "Gradient",
    "LookSAMPerturbation",
    "MSAMPerturbation",
    "Pass",
    "Perturbation",
    "Point",
    "Program",
    "SAMPerturbation",
    "SSAMPerturbation",
    "USAMPerturbation",
    "unperturbed",
]
