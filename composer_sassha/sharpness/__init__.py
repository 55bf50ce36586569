"""Measures of the sharpness of a minimum, for any model with a loss. Plain PyTorch."""

from composer_sassha.sharpness.hessian import Eigenpairs, Estimate, top_eigenpairs, top_eigenvalues, trace
from composer_sassha.sharpness.landscape import filter_normalized, interpolation, line, plane
from composer_sassha.sharpness.measures import Measures, measure
from composer_sassha.sharpness.objective import Objective, Unfinished, objective_of, undisturbed
from composer_sassha.sharpness.perturbed_loss import (
    asam_sharpness,
    average_sharpness,
    m_sharpness,
    rise,
    sam_sharpness,
)
from composer_sassha.sharpness.spectral_density import Spectrum, spectrum

__all__ = [
    "Eigenpairs",
    "Estimate",
    "Measures",
    "Objective",
    "Spectrum",
    "Unfinished",
    "asam_sharpness",
    "average_sharpness",
    "filter_normalized",
    "interpolation",
    "line",
    "m_sharpness",
    "measure",
    "objective_of",
    "plane",
    "rise",
    "sam_sharpness",
    "spectrum",
    "top_eigenpairs",
    "top_eigenvalues",
    "trace",
    "undisturbed",
]
