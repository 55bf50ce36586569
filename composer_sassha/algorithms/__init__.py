"""The methods as Composer algorithms, added to a Trainer in one line."""

from composer_sassha.algorithms.asam import ASAM
from composer_sassha.algorithms.checkpoints import ignore_own_entries
from composer_sassha.algorithms.esam import ESAM
from composer_sassha.algorithms.grad_scaler import ClosureGradScaler
from composer_sassha.algorithms.gsam import GSAM
from composer_sassha.algorithms.lazy_hessian import LazyHessian
from composer_sassha.algorithms.looksam import LookSAM
from composer_sassha.algorithms.msam import MSAM
from composer_sassha.algorithms.sam import SAM
from composer_sassha.algorithms.sassha import MSassha, Sassha
from composer_sassha.algorithms.schedule import FollowLR, Schedule
from composer_sassha.algorithms.ssam import SSAM
from composer_sassha.algorithms.usam import USAM

__all__ = [
    "ASAM",
    "ESAM",
    "GSAM",
    "MSAM",
    "SAM",
    "SSAM",
    "USAM",
    "ClosureGradScaler",
    "FollowLR",
    "LazyHessian",
    "LookSAM",
    "MSassha",
    "Sassha",
    "Schedule",
    "ignore_own_entries",
]
