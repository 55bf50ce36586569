"""Attributes that are replaced for a while."""

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any


@contextlib.contextmanager
def replaced(replacements: Iterable[tuple[Any, str, Callable[[Any], Any]]]) -> Iterator[None]:
    """Replace attributes within the context.

    Args:
        replacements: the owner, the attribute's name, and a function from the old value to the new one.

    Example:
        >>> import math
        >>> with replaced([(math, "tau", lambda old: old / 2)]):
        ...     math.tau == math.pi
        True
    """
    with contextlib.ExitStack() as stack:
        for owner, name, new in replacements:
            old = getattr(owner, name)
            if name in vars(owner):
                stack.callback(setattr, owner, name, old)
            else:  # inherited
                stack.callback(delattr, owner, name)
            setattr(owner, name, new(old))
        yield
