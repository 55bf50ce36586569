"""Estimators of the Hessian's diagonal, their random probes, and the lazy refresh. Plain PyTorch."""

from composer_sassha.curvature.by_parts import differentiable_twice
from composer_sassha.curvature.empirical_fisher import empirical_fisher_diagonal
from composer_sassha.curvature.estimation import Estimation
from composer_sassha.curvature.estimators import ESTIMATORS, Evaluation
from composer_sassha.curvature.finite_difference import finite_difference_diagonal
from composer_sassha.curvature.float16 import NormsInFloat32
from composer_sassha.curvature.gauss_newton import gauss_newton_diagonal
from composer_sassha.curvature.hutchinson import hutchinson_diagonal
from composer_sassha.curvature.lazy import LazyCurvature
from composer_sassha.curvature.probes import rademacher

__all__ = [
    "ESTIMATORS",
    "Estimation",
    "Evaluation",
    "LazyCurvature",
    "NormsInFloat32",
    "differentiable_twice",
    "empirical_fisher_diagonal",
    "finite_difference_diagonal",
    "gauss_newton_diagonal",
    "hutchinson_diagonal",
    "rademacher",
]
