"""Let rank 0 act for all ranks."""

from collections.abc import Callable
from functools import wraps
from typing import Any, ParamSpec, TypeVar

from composer.utils import dist

P = ParamSpec("P")
T = TypeVar("T")


def on_rank_zero(action: Callable[P, T]) -> Callable[P, T]:
    """Run `action` on rank 0 and broadcast its result or exception. Every rank must call it.

    >>> on_rank_zero(max)(1, 2)
    2
    """

    @wraps(action)
    def collective(*args: P.args, **kwargs: P.kwargs) -> T:
        answer: list[Any] = [None]
        if dist.get_global_rank() == 0:
            try:
                answer = [action(*args, **kwargs)]
            except Exception as error:
                answer = [error]
        # All ranks must go the same way afterwards, or the next collective waits for a rank that has left.
        dist.broadcast_object_list(answer)
        if isinstance(answer[0], Exception):
            raise answer[0]
        return answer[0]

    return collective
