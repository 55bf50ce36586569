"""What forwards change in a model besides gradients: buffers, untrained parameters, plain attributes."""

import operator
import random
import types
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator
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

from composer_sassha.common.contents import Content, Contents
from composer_sassha.common.sharding import is_sharded

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
    """What a model was at one moment; see `SideEffects.take`.

    Attributes:
        modules: the modules' own dictionaries, each with the module's name.
        containers: dictionaries, lists and the like in attributes, each with its module and a shallow copy.
        generators: functions that put a generator or an array back, each with its module.
        contents: of the tensors.
        watched: objects of other classes with their attributes, and where they are.
    """

    modules: list[tuple[str, "_Kept"]] = field(default_factory=list)
    containers: list[tuple[str, Any, Any]] = field(default_factory=list)
    generators: list[tuple[str, Callable[[], Any]]] = field(default_factory=list)
    contents: list[Content] = field(default_factory=list)
    watched: list[tuple[str, Any, dict[str, Any]]] = field(default_factory=list)


class SideEffects:
    """Remembers a model, so that what a forward changes in it can be undone.

    Covered are the buffers and the parameters that are not trained (in value, shape, dtype and presence), the
    attributes of all modules, lists, dictionaries and objects of plain data in them, arrays, and random
    number generators. Attributes are compared by identity, large tensors by PyTorch's version counter and
    address; see `Contents` for what is copied. If something in a module cannot be put back, all of the module
    is left as it is, and that is said once: a cache restored without its flag would be worse than none.

    Args:
        model: the model; wrapped for data-parallel training, compiled, or neither.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._contents = Contents()
        self._known: dict[int, _Kept] = {}
        self._named: set[str] = set()

    def take(self, trained: Iterable[Tensor] | None = None, start: bool = False, learn: bool = True) -> Seen:
        """Return what the model is now.

        Args:
            trained: parameters that are left alone. Default: those that require a gradient.
            start: a step begins. Default: False.
            learn: a forward may have run since the last call. Default: True.
        """
        seen = Seen()
        if trained is None:
            trained = (p for p in self.model.parameters() if p.requires_grad)
        walk = _Walk(seen, {id(p) for p in trained}, self._known, is_sharded(self.model))
        walk.modules("", self.model)
        self._known = {id(kept.module): kept for _, kept in seen.modules}
        size = sum(p.nbytes for p in walk.trained)
        seen.contents = self._contents.take(walk.tensors, size, start, learn)
        for where, kind in walk.unknown:
            self._name(where, f"is a {kind}, whose position cannot be put back")
        return seen

    def tensors(self, seen: Seen) -> list[Tensor]:
        """Return the tensors that `restore` may write into."""
        return [content.tensor for content in seen.contents if content.copy is not None]

    def settle(self, seen: Seen) -> None:
        """Take the model for unchanged since `seen`; see `Contents.settle`."""
        self._contents.settle(seen.contents)

    def restore(self, seen: Seen) -> None:
        """Make the model what it was."""
        for where, value, before in seen.watched:
            if any(before.get(name) is not now for name, now in vars(value).items()):
                self._name(where, f"is a {type(value).__name__} that a forward changes")
        lost = self._contents.lost(seen.contents)
        for where in lost:
            self._name(where, "is a large tensor that no forward had changed before")
        left = {where.rpartition(".")[0] for where in lost}
        for module, kept in seen.modules:
            if module not in left:
                kept.restore()
        for module, value, before in seen.containers:
            if module not in left:
                _refill(value, before)
        self._contents.restore([c for c in seen.contents if c.where.rpartition(".")[0] not in left])
        for module, put_back in seen.generators:
            if module not in left:
                put_back()

    def _name(self, where: str, what: str) -> None:
        if where not in self._named:
            self._named.add(where)
            warnings.warn(
                f"model.{where} {what}: each pass of a step changes it once more; change it after "
                "optimizer.step() instead of in the forward, or keep it in a buffer",
                stacklevel=10,
            )


class _Kept:
    """What a module keeps in its dictionaries, as it was when one of them last changed.

    Args:
        module: the module.
        sharded: FSDP2 puts parts and gathered parameters into its parameters, which are left out then.
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
                _refill(each, copy)


class _Walk:
    """Goes through all that a model keeps, each thing once."""

    def __init__(self, seen: Seen, trained: set[int], known: dict[int, _Kept], sharded: bool) -> None:
        self.seen, self._trained, self._known, self._sharded = seen, trained, known, sharded
        self.tensors: list[tuple[str, Tensor]] = []
        self.trained: list[Tensor] = []
        self.unknown: list[tuple[str, str]] = []  # where, and of which class
        self._met: set[int] = set()

    def modules(self, path: str, model: nn.Module) -> None:
        for name, module in model.named_modules(prefix=path):
            if id(module) in self._met:
                continue
            self._met.add(id(module))
            # What a lazy module makes of itself in its first forward stays.
            lazy = isinstance(module, LazyModuleMixin) and module.has_uninitialized_params()  # type: ignore[misc]
            if isinstance(module, _WRAPPERS) or lazy:
                continue
            kept = self._known.get(id(module))
            if kept is None or kept.module is not module or kept.has_changed():
                kept = _Kept(module, self._sharded)
            self.seen.modules.append((name, kept))
            for key, value in kept.attributes:
                self.look(name, key, value)
            for key, value in (*module._buffers.items(), *module._parameters.items()):
                if id(value) in self._trained:
                    self.trained.append(value)
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
            if id(value) not in self._trained and not gathered and (parameter or not value.requires_grad):
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


def _refill(value: Any, before: Any) -> None:
    """Put back what a container held."""
    if not _is_same(value, before):
        value.clear()
        (value.extend if isinstance(value, (list, deque)) else value.update)(before)
