"""Checks of arguments. Every message names the owner and argument, what was given and what is allowed."""

import math
from numbers import Integral, Real
from typing import Any


class SettingError(ValueError):
    """A setting that proves unusable only once the training has begun; its message is one line."""


def number(
    owner: str, name: str, value: Any, low: float, high: float = math.inf, *, below: bool = False
) -> float:
    """Return `value` if it is a finite number in [low, high], or in [low, high) with `below`; else raise.

    Raises:
        TypeError: `value` is not a number.
        ValueError: `value` is not finite or lies outside the range.

    Example:
        >>> number("SAM", "rho", -0.1, low=0)
        Traceback (most recent call last):
            ...
        ValueError: SAM: rho=-0.1 is not allowed; it must be a number >= 0
    """
    bounds = f">= {low:g}" if high == math.inf else f"in [{low:g}, {high:g}{')' if below else ']'}"
    if not _is_a(Real, value):
        raise TypeError(f"{owner}: {name}={value!r} is not allowed; it must be a number {bounds}")
    if not (math.isfinite(value) and low <= value <= high and not (below and value == high)):
        raise ValueError(f"{owner}: {name}={value!r} is not allowed; it must be a number {bounds}")
    checked: float = value
    return checked


def fraction(owner: str, name: str, value: Any) -> float:
    """Return `value` if it is a number in (0, 1]; else raise as `number` does.

    Example:
        >>> fraction("ESAM", "beta", 0)
        Traceback (most recent call last):
            ...
        ValueError: ESAM: beta=0 is not allowed; it must be a number in (0, 1]
    """
    message = f"{owner}: {name}={value!r} is not allowed; it must be a number in (0, 1]"
    if not _is_a(Real, value):
        raise TypeError(message)
    if not 0 < value <= 1:
        raise ValueError(message)
    checked: float = value
    return checked


def boolean(owner: str, name: str, value: Any) -> bool:
    """Return `value` if it is True or False; else raise TypeError.

    Example:
        >>> boolean("SAM", "sync_ascent", "yes")
        Traceback (most recent call last):
            ...
        TypeError: SAM: sync_ascent='yes' is not allowed; it must be True or False
    """
    if not isinstance(value, bool):
        raise TypeError(f"{owner}: {name}={value!r} is not allowed; it must be True or False")
    return value


def integer(owner: str, name: str, value: Any, low: int) -> int:
    """Return `value` if it is an integer >= `low`; else raise.

    Raises:
        TypeError: `value` is not an integer.
        ValueError: `value` is below `low`.

    Example:
        >>> integer("SAM", "interval", 0, low=1)
        Traceback (most recent call last):
            ...
        ValueError: SAM: interval=0 is not allowed; it must be an integer >= 1
    """
    message = f"{owner}: {name}={value!r} is not allowed; it must be an integer >= {low}"
    if not _is_a(Integral, value):
        raise TypeError(message)
    if value < low:
        raise ValueError(message)
    checked: int = value
    return checked


def _is_a(kind: type, value: Any) -> bool:
    """Whether a value is a number of a kind, NumPy's included, and no boolean."""
    return isinstance(value, kind) and not isinstance(value, bool)
