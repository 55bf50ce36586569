"""A walk through all that a model keeps: buffers, parameters, attributes, and what is in those."""

import operator
import random
import types
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch._dynamo import OptimizedModule
from torch.distributed.tensor import DTensor
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from composer_sassha.common.contents import Content

# Their attributes are their own business: a reducer, compiled code.
_WRAPPERS = (DistributedDataParallel, OptimizedModule)
# What nn.Module keeps for itself: hooks and the like. A forward may fill these dictionaries.
_INTERNAL = frozenset(vars(nn.Module()))
_FILLED = ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set")

_ATOMS = frozenset(
    {
        *(type(None), bool, int, float, complex, str, bytes, type, range, slice, torch.dtype, torch.device),
        *(types.FunctionType, types.BuiltinFunctionType, types.MethodType, types.ModuleType, torch.Size),
    }
)
_CONTAINERS = (dict, list, set, deque)
_DATA = (*_CONTAINERS, tuple, Tensor, np.ndarray)
# Objects of these libraries are neither data of the model nor watched.
_LIBRARIES = frozenset({"torch", "composer", "composer_sassha", "lightning", "pytorch_lightning", "builtins"})


@dataclass
class Seen:
    """What a model was at one moment; see `composer_sassha.common.side_effects`.

    Attributes:
        modules: the modules' own dictionaries, each with the module's name.
        containers: dictionaries, lists and the like in attributes, each with its module and a shallow copy.
        generators: functions that put a generator or an array back, each with its module.
        contents: of the tensors.
        watched: objects of other classes with their attributes, and where they are.
    """

    modules: list[tuple[str, "Kept"]] = field(default_factory=list)
    containers: list[tuple[str, Any, Any]] = field(default_factory=list)
    generators: list[tuple[str, Callable[[], Any]]] = field(default_factory=list)
    contents: list[Content] = field(default_factory=list)
    watched: list[tuple[str, Any, dict[str, Any]]] = field(default_factory=list)


class Kept:
    """What a module keeps in its dictionaries, as it was when one of them last changed.

    Args:
        module: the module.
        sharded: leave out the parameters, among which FSDP2 puts parts and gathered ones.
    """

    def __init__(self, module: nn.Module, sharded: bool) -> None:
        self.module, found = module, vars(module)
        self._names = [key for key in found if key not in _INTERNAL or key == "training"]
        self._filled = [found[name] for name in _FILLED[sharded:]]
        self._copies = [(each, each.copy()) for each in (found, *self._filled)]
        self._state, self._sizes = self._now(), [len(each) for each, _ in self._copies]
        # Attributes that may change although the module still has the same object.
        self.attributes = [(key, found[key]) for key in self._names if not _is_constant(found[key])]

    def _now(self) -> list[Any]:
        found = vars(self.module)
        values = (found[name] for name in self._names)
        return [*values, *(each for filled in self._filled[:-1] for each in filled.values())]

    def has_changed(self) -> bool:
        """Whether any entry is another object than it was."""
        if self._sizes != [len(each) for each, _ in self._copies]:
            return True
        try:
            return not all(map(operator.is_, self._now(), self._state))
        except KeyError:  # one has gone and another one come
            return True

    def restore(self) -> None:
        """Put back every entry, if any has changed."""
        if self.has_changed():
            for each, copy in self._copies:
                refill(each, copy)


class Walk:
    """Goes through all that a model keeps, each thing once.

    Args:
        trained: the ids of parameters that are left out.
        known: what modules kept in the walk before, by their ids.
        sharded: whether FSDP2 shards the model.
    """

    def __init__(self, trained: set[int], known: dict[int, Kept], sharded: bool) -> None:
        self.seen, self.trained_ids, self._known, self._sharded = Seen(), trained, known, sharded
        self.tensors: list[tuple[str, Tensor]] = []
        self.trained, self.lazy = 0, False  # bytes; and whether a lazy module has been left out
        self.unknown: list[tuple[str, str]] = []  # where, and of which class
        self._met: set[int] = set()

    def has_changed(self) -> bool:
        """Whether another walk would find other things, or things that only a walk can look at."""
        seen = self.seen
        return (
            bool(self.lazy or seen.generators or seen.watched)
            or any(kept.has_changed() for _, kept in seen.modules)
            or not all(_is_same(value, before) for _, value, before in seen.containers)
        )

    def modules(self, path: str, model: nn.Module) -> None:
        """Walk through a model that is found at `path`."""
        for name, module in model.named_modules(prefix=path):
            if id(module) in self._met:
                continue
            self._met.add(id(module))
            # What a lazy module makes of itself in its first forward stays.
            lazy = isinstance(module, LazyModuleMixin) and module.has_uninitialized_params()  # type: ignore[misc]
            self.lazy |= lazy
            if isinstance(module, _WRAPPERS) or lazy:
                continue
            kept = self._known.get(id(module))
            if kept is None or kept.module is not module or kept.has_changed():
                kept = Kept(module, self._sharded)
            self.seen.modules.append((name, kept))
            for key, value in kept.attributes:
                self.look(name, key, value)
            for key, value in (*module._buffers.items(), *module._parameters.items()):
                if id(value) in self.trained_ids:
                    self.trained += value.nbytes
                elif value is not None:
                    self.look(name, key, value)

    def look(self, module: str, key: str, value: Any) -> None:
        """Look at one value under an attribute of a module."""
        where = f"{module}.{key}" if module else key
        if isinstance(value, nn.Module):
            self.modules(where, value)
            return
        if type(value) in _ATOMS or id(value) in self._met:
            return
        self._met.add(id(value))
        if isinstance(value, Tensor):
            # FSDP2 frees the memory of parameters that it has gathered. And a tensor with a graph was made by
            # a forward, and is not written to.
            parameter = isinstance(value, nn.Parameter)
            gathered = parameter and self._sharded and not isinstance(value, DTensor)
            if id(value) not in self.trained_ids and not gathered and (parameter or not value.requires_grad):
                self.tensors.append((where, value))
        elif isinstance(value, (*_CONTAINERS, tuple, frozenset)):
            if isinstance(value, _CONTAINERS):
                self.seen.containers.append((module, value, value.copy()))
            for each in value.values() if isinstance(value, dict) else value:
                self.look(module, key, each)
        elif (put_back := _state_of(value)) is not None:
            self.seen.generators.append((module, put_back))
        elif isinstance(value, Iterator):
            self.unknown.append((where, type(value).__name__))
        else:
            self._object(module, key, value)

    def _object(self, module: str, key: str, value: Any) -> None:
        library = type(value).__module__.partition(".")[0]
        if library in _LIBRARIES or isinstance(value, Optimizer) or not hasattr(value, "__dict__"):
            return
        found = vars(value)
        if all(
            isinstance(each, (*_ATOMS, *_CONTAINERS, tuple, Tensor, np.ndarray)) for each in found.values()
        ):
            self.seen.containers.append((module, found, dict(found)))
            for each in list(found.values()):
                self.look(module, key, each)
        else:
            self.seen.watched.append((f"{module}.{key}" if module else key, value, dict(found)))


def _state_of(value: Any) -> Callable[[], Any] | None:
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
    if isinstance(value, np.ndarray):
        copy = value.copy()
        return lambda: np.copyto(value, copy) if value.flags.writeable else None
    return None


def _is_constant(value: Any) -> bool:
    return type(value) in _ATOMS or (type(value) is tuple and all(type(each) in _ATOMS for each in value))


def _is_same(value: Any, before: Any) -> bool:
    """Whether a container holds the very same objects in the same order."""
    if isinstance(value, set):
        return bool(value == before)
    if len(value) != len(before):
        return False
    if isinstance(value, dict):
        return all(map(operator.is_, value.values(), before.values())) and all(
            map(operator.is_, value, before)
        )
    return all(map(operator.is_, value, before))


def refill(value: Any, before: Any) -> None:
    """Put back what a container held."""
    if not _is_same(value, before):
        value.clear()
        (value.extend if isinstance(value, (list, deque)) else value.update)(before)
