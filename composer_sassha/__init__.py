"""Sharpness-aware and second-order training for MosaicML Composer.

The plain PyTorch parts (`optim`, `perturbations`, `curvature`) never import Composer. The names below are
loaded when they are first used, so that importing one of those parts does not import Composer either.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from composer_sassha.algorithms import SAM, LazyHessian, Sassha
    from composer_sassha.optim import SASSHA, SharpnessAwareOptimizer

__version__ = "0.1.0"

_HOME = {
    "SASSHA": "optim",
    "SharpnessAwareOptimizer": "optim",
    "SAM": "algorithms",
    "LazyHessian": "algorithms",
    "Sassha": "algorithms",
}

__all__ = ["SAM", "SASSHA", "LazyHessian", "Sassha", "SharpnessAwareOptimizer"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
