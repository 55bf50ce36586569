"""The learning rate of a parameter group, and the largest that its scheduler will set."""

from collections.abc import Mapping
from typing import Any


def rate_of(group: Mapping[str, Any]) -> float:
    """Return the learning rate; 0 where the optimizer finds one itself (`lr=None`, as Adafactor's)."""
    lr = group.get("lr")
    return 0.0 if lr is None else float(lr)


def largest_rate(group: Mapping[str, Any]) -> float:
    """Return the largest rate that is known: `max_lr`, `initial_lr` or `lr`, the first that is there.

    Example:
        >>> largest_rate({"lr": 0.05, "initial_lr": 0.1})
        0.1
    """
    return float(group.get("max_lr") or group.get("initial_lr") or rate_of(group))


def fraction_of_largest_rate(
    group: Mapping[str, Any], lr_min: float = 0.0, lr_max: float | None = None
) -> float:
    """Return `(lr - lr_min) / (lr_max - lr_min)`, clamped to [0, 1]; 1 where that has no meaning.

    Args:
        group: with `lr`; the scheduler that warms up to a rate leaves it as `max_lr` (OneCycleLR), others
            start from their largest and leave that as `initial_lr`.
        lr_min: the rate for which the fraction is 0. Default: 0.
        lr_max: the rate for which it is 1. Default: `max_lr`, `initial_lr` or `lr`, the first that is there.

    Example:
        >>> fraction_of_largest_rate({"lr": 0.05, "initial_lr": 0.1})
        0.5
        >>> fraction_of_largest_rate({"lr": 0.05, "initial_lr": 0.004, "max_lr": 0.1})
        0.5
        >>> fraction_of_largest_rate({"lr": 0.2, "initial_lr": 0.1})
        1.0
    """
    lr = rate_of(group)
    if lr_max is None:
        lr_max = largest_rate(group)
    span = lr_max - lr_min
    return min(max((lr - lr_min) / span, 0.0), 1.0) if span > 0 else 1.0
