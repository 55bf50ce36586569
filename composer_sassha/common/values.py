"""The data that a model may keep in attributes: how it is copied, compared and put back."""

import array
import enum
import operator
import random
import types
import weakref
from collections import OrderedDict, deque
from collections.abc import Callable, Container, Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.jit import ScriptModule
from torch.optim import Optimizer

ATOMS = frozenset(
    {
        *(type(None), bool, int, float, complex, str, bytes, type, range, slice, torch.dtype, torch.device),
        *(types.FunctionType, types.BuiltinFunctionType, types.MethodType, types.ModuleType, torch.Size),
        *(torch.layout, torch.memory_format, *weakref.ProxyTypes),  # a dead proxy answers nothing
    }
)
CONTAINERS = (OrderedDict, dict, list, set, deque)
HOLDERS = (*CONTAINERS, tuple, frozenset)
# What an object may hold besides, so that it can be put back.
_WHOLE = (
    *(type, enum.Enum, np.generic, np.ndarray, Tensor, nn.Module, bytearray, array.array),
    *(torch.Generator, random.Random, np.random.RandomState, np.random.Generator),
)
# Objects of these libraries are neither data of the model nor watched.
_LIBRARIES = frozenset(
    {"torch", "composer", "composer_sassha", "lightning", "pytorch_lightning", "logging", "builtins"}
)


def plain_parts(value: Any, known: Container[int] = ()) -> set[int] | None:
    """Return the ids of all that an object holds, however deep; None: some of it cannot be put back.

    Args:
        value: the object.
        known: ids of what can be put back.
    """
    todo, met = [value], set[int]()
    for each in todo:
        if type(each) in ATOMS or isinstance(each, _WHOLE) or id(each) in met or id(each) in known:
            continue
        met.add(id(each))
        found = attributes_of(each)
        if isinstance(each, HOLDERS):
            todo.extend(entries_of(each))
        elif found is None or isinstance(each, Iterator) or is_foreign(each):
            return None
        todo.extend((found or {}).values())
    return met


def state_of(value: Any) -> Callable[[], Any] | None:
    """Return a function that puts a generator or an array back to what it is now; None: it is neither."""
    if isinstance(value, torch.Generator):
        state = value.get_state()
        return lambda: value.set_state(state)
    if isinstance(value, random.Random):
        drawn = value.getstate()
        return lambda: value.setstate(drawn)
    if isinstance(value, np.random.RandomState):
        legacy = value.get_state()
        return lambda: value.set_state(legacy)
    if isinstance(value, np.random.Generator):
        bits, position = value.bit_generator, value.bit_generator.state
        return lambda: setattr(bits, "state", position)
    if isinstance(value, np.ndarray) and value.flags.writeable:
        copy = value.copy()
        return lambda: np.copyto(value, copy)
    if isinstance(value, (bytearray, array.array)):
        entries = value[:]
        return lambda: operator.setitem(value, slice(None), entries)
    return None


def state_of_script(module: ScriptModule) -> Callable[[], Any]:
    """Return a function that puts the attributes of a compiled module back to what they are now."""
    kept, names = module._c, module._concrete_type.get_attributes()
    before = {name: kept.getattr(name) for name in names}

    def put_back() -> None:
        for name, value in before.items():
            if kept.getattr(name) is not value:
                kept.setattr(name, value)

    return put_back


def is_foreign(value: Any) -> bool:
    """Whether an object is neither data of the model nor watched."""
    return (
        isinstance(value, (type, enum.Enum, Optimizer))
        or type(value).__module__.partition(".")[0] in _LIBRARIES
    )


def slots_of(kind: type) -> list[str]:
    """Return the names of the attributes that a class keeps outside of `__dict__`."""
    members = (found for each in kind.__mro__ if "__slots__" in vars(each) for found in vars(each).items())
    return [name for name, member in members if isinstance(member, types.MemberDescriptorType)]


def attributes_of(value: Any) -> dict[str, Any] | None:
    """Return all attributes of an object; None: it has no room for any."""
    names = slots_of(type(value))
    if not names and not hasattr(value, "__dict__"):
        return None
    slots = {name: getattr(value, name) for name in names if hasattr(value, name)}
    return {**slots, **getattr(value, "__dict__", {})}


def fill_slots(value: Any, before: dict[str, Any]) -> None:
    """Put back the attributes of an object that are outside of its `__dict__`."""
    for name in slots_of(type(value)):
        if name in before:
            object.__setattr__(value, name, before[name])
        elif hasattr(value, name):
            object.__delattr__(value, name)


def is_constant(value: Any) -> bool:
    """Whether a value is what it is for good."""
    return type(value) in ATOMS or (type(value) is tuple and all(type(each) in ATOMS for each in value))


def _kind_of(value: Any) -> Any:
    own = type(value)
    return own if own in HOLDERS else next(kind for kind in HOLDERS if isinstance(value, kind))


# By the methods of Python's own containers: those of a subclass may do anything, or refuse (transformers'
# outputs do).
def entries_of(value: Any) -> Iterable[Any]:
    """Return what a container holds, without the keys of a dictionary."""
    kind = _kind_of(value)
    held: Iterable[Any] = kind.values(value) if isinstance(value, dict) else kind.__iter__(value)
    return held


def shallow(value: Any) -> Any:
    """Return a shallow copy of a container, of Python's own class."""
    kind = _kind_of(value)
    if type(value) is kind:
        return value.copy()
    if isinstance(value, dict):
        return dict(kind.items(value))
    return set.copy(value) if kind is set else list(kind.__iter__(value))


def is_same(value: Any, before: Any) -> bool:
    """Whether a container holds the very same objects in the same order as its copy."""
    kind = _kind_of(value)
    if kind is set:
        return bool(set.__eq__(value, before))
    if kind.__len__(value) != len(before):
        return False
    if isinstance(value, dict) and not all(map(operator.is_, kind.keys(value), before)):
        return False
    return all(map(operator.is_, entries_of(value), entries_of(before)))


def refill(value: Any, before: Any) -> None:
    """Put back what a container held."""
    if not is_same(value, before):
        kind = _kind_of(value)
        kind.clear(value)
        (kind.extend if kind in (list, deque) else kind.update)(value, before)
