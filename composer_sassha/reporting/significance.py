"""Test whether the values of two methods differ."""

import math
import warnings
from collections.abc import Sequence

from scipy import stats

LEVEL = 0.05  # of significance, for all tests of a table together


def welch(first: Sequence[float], second: Sequence[float]) -> float | None:
    """Return the two-sided p of Welch's t-test; None where it does not exist.

    It does not exist with fewer than two values on a side, if neither side varies, and for values that are
    not finite.

    Args:
        first: values of one method.
        second: values of the other.

    >>> round(welch([1.0, 2.0, 3.0], [2.0, 4.0, 9.0]), 4)
    0.2838
    >>> welch([1.0], [1.0, 2.0]) is welch([1.0, 1.0], [2.0, 2.0]) is None
    True
    """
    if min(len(first), len(second)) < 2 or len({*first}) == len({*second}) == 1:
        return None
    with warnings.catch_warnings():
        # It warns if one side does not vary; the result is right.
        warnings.filterwarnings("ignore", message="Precision loss")
        p = float(stats.ttest_ind(first, second, equal_var=False).pvalue)
    return p if math.isfinite(p) else None
