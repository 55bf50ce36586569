"""Hooks of the backward: called with the gradient of a pass, and not with other derivatives."""

import contextlib
import functools
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch import Tensor
from torch.utils.hooks import BackwardHook

from composer_sassha.common.replaced import replaced

# Not of one thread: a backward calls hooks in threads of its own.
_silent = False
_retaining: list[weakref.ref[Tensor]] = []  # the running step's activations


@contextlib.contextmanager
def silenceable() -> Iterator[None]:
    """Make `silence` work on the hooks of modules and activations in forwards within this context.

    A product with the Hessian, a second loss and a second forward run them again, with other gradients.
    """
    # Nodes of a graph do not give their hooks away, so that each is wrapped where it is registered.
    places: list[tuple[Any, str, Callable[[Any], Any]]] = [
        (BackwardHook, "__init__", _of_a_module),
        (Tensor, "register_hook", _of_a_tensor),
        (Tensor, "retain_grad", _noted),
    ]
    try:
        with replaced(places):
            yield
    finally:
        _retaining.clear()


@contextlib.contextmanager
def silence() -> Iterator[None]:
    """Call no hook, and leave the gradients that activations retain as they are."""
    global _silent
    before, kept = _silent, [(t, t.grad) for t in _alive()]
    _silent = True
    try:
        yield
    finally:
        _silent = before
        for t, grad in kept:
            t.grad = grad


def retaining() -> list[Tensor]:
    """Return the activations that will retain a gradient and have none yet."""
    return [t for t in _alive() if t.grad is None]


def _alive() -> list[Tensor]:
    return [t for ref in _retaining if (t := ref()) is not None]


def _silenced(hook: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(hook)
    def call(*args: Any) -> Any:
        return None if _silent else hook(*args)

    return call


def _of_a_module(init: Callable[..., None]) -> Callable[..., None]:
    def wrapped(self: Any, module: Any, hooks: Sequence[Any], pre_hooks: Sequence[Any]) -> None:
        init(self, module, [*map(_silenced, hooks)], [*map(_silenced, pre_hooks)])

    return wrapped


def _of_a_tensor(register: Callable[..., Any]) -> Callable[..., Any]:
    return lambda self, hook: register(self, _silenced(hook))


def _noted(retain_grad: Callable[[Tensor], None]) -> Callable[[Tensor], None]:
    def wrapped(self: Tensor) -> None:
        retain_grad(self)
        _retaining.append(weakref.ref(self))

    return wrapped
