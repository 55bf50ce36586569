"""Attributes that are replaced for a while."""

import contextlib
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any

_Change = Callable[[Any], Any]

# The attribute before all replacements, whether it is the owner's own, and the replacements by now. Threads
# that train models of their own enter and leave in any order, so that none may put back what it has found.
_places: dict[tuple[Any, str], tuple[Any, bool, list[_Change]]] = {}
_lock = threading.RLock()


@contextlib.contextmanager
def replaced(replacements: Iterable[tuple[Any, str, _Change]]) -> Iterator[None]:
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
            with _lock:
                own = name in vars(owner)
                _, _, changes = _places.setdefault((owner, name), (getattr(owner, name), own, []))
                changes.append(new)
                stack.callback(_restore, owner, name, new)
                _apply(owner, name)
        yield


def _restore(owner: Any, name: str, new: _Change) -> None:
    with _lock:
        _places[owner, name][2].remove(new)
        _apply(owner, name)


def _apply(owner: Any, name: str) -> None:
    value, own, changes = _places[owner, name]
    if changes or own:
        for change in changes:
            value = change(value)
        setattr(owner, name, value)
    elif name in vars(owner):  # it is inherited
        delattr(owner, name)
    if not changes:
        del _places[owner, name]
