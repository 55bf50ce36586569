"""Whether the values of two methods differ."""

import math
import warnings
from collections.abc import Sequence

from scipy import stats

LEVEL = 0.05  # of significance, for all tests of a table together


def welch(first: Sequence[float], second: Sequence[float]) -> float | None:
    """The two-sided p of Welch's t-test; None where it does not exist.

    That is with fewer than two values on either side, where neither side varies, and with values that are not
    finite.

    >>> round(welch([1.0, 2.0, 3.0], [2.0, 4.0, 9.0]), 4)
    0.2838
    >>> welch([1.0], [1.0, 2.0]) is welch([1.0, 1.0], [2.0, 2.0]) is None
    True
    """
    if min(len(first), len(second)) < 2 or len({*first}) == len({*second}) == 1:
        return None
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", message="Precision loss"
        )  # one side does not vary, which is no harm
        p = float(stats.ttest_ind(first, second, equal_var=False).pvalue)
    return p if math.isfinite(p) else None
