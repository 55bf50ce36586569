"""Sharpness-aware and second-order training for MosaicML Composer.

The plain PyTorch parts (`common`, `perturbations`, `curvature`, `optim`, `sharpness`) never import Composer.
The names below are loaded when they are first used, so that importing one of those parts does not import
Composer either.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from composer_sassha.algorithms import (
        ASAM,
        ESAM,
        GSAM,
        MSAM,
        SAM,
        SSAM,
        USAM,
        ClosureGradScaler,
        FollowLR,
        LazyHessian,
        LookSAM,
        MSassha,
        Sassha,
        Schedule,
        ignore_own_entries,
    )
    from composer_sassha.callbacks import SharpnessMonitor
    from composer_sassha.optim import SASSHA, AdaHessian, SharpnessAwareOptimizer, Sophia

__version__ = "0.1.0"

__all__ = [
    "ASAM",
    "ESAM",
    "GSAM",
    "MSAM",
    "SAM",
    "SASSHA",
    "SSAM",
    "USAM",
    "AdaHessian",
    "ClosureGradScaler",
    "FollowLR",
    "LazyHessian",
    "LookSAM",
    "MSassha",
    "Sassha",
    "Schedule",
    "SharpnessAwareOptimizer",
    "SharpnessMonitor",
    "Sophia",
    "ignore_own_entries",
]

# Which part has a name; the algorithms have all others.
_PARTS = dict.fromkeys(("SASSHA", "AdaHessian", "SharpnessAwareOptimizer", "Sophia"), "optim") | {
    "SharpnessMonitor": "callbacks"
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_PARTS.get(name, 'algorithms')}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
