"""Probes and estimators of the Hessian's diagonal, and the lazy refresh. Plain PyTorch."""

from composer_sassha.curvature.hutchinson import hutchinson_diagonal
from composer_sassha.curvature.lazy import ESTIMATORS, LazyCurvature
from composer_sassha.curvature.probes import rademacher

__all__ = ["ESTIMATORS", "LazyCurvature", "hutchinson_diagonal", "rademacher"]
