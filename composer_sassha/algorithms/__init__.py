"""The methods as Composer algorithms: one line in a script."""

from composer_sassha.algorithms.lazy_hessian import LazyHessian
from composer_sassha.algorithms.sam import SAM
from composer_sassha.algorithms.sassha import Sassha

__all__ = ["SAM", "LazyHessian", "Sassha"]
