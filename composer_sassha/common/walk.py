"""A walk through all that a model keeps: buffers, parameters, attributes, and what is in those."""

import operator
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch._dynamo import OptimizedModule
from torch.distributed.tensor import DTensor
from torch.jit import ScriptModule
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.parallel import DistributedDataParallel

from composer_sassha.common import contents
from composer_sassha.common.contents import Content
from composer_sassha.common.values import (
    ATOMS,
    CONTAINERS,
    HOLDERS,
    attributes_of,
    entries_of,
    fill_slots,
    is_constant,
    is_foreign,
    is_same,
    plain_parts,
    refill,
    shallow,
    slots_of,
    state_of,
    state_of_script,
)

# Their attributes are their own business: a reducer, compiled code.
_WRAPPERS = (DistributedDataParallel, OptimizedModule)
# What nn.Module keeps for itself: hooks and the like. A forward may fill these dictionaries.
_INTERNAL = frozenset(vars(nn.Module()))
_FILLED = ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set")


@dataclass
class Seen:
    """The state of a model at one moment; see `composer_sassha.common.side_effects`.

    Attributes:
        modules: the modules' own dictionaries, each with the module's name.
        containers: dictionaries, lists and the like in attributes, each with its module and a shallow copy.
        generators: functions that put back what is no container, such as a generator, each with its module.
        contents: of the tensors.
        watched: objects of other classes with their attributes, and where they are.
    """

    modules: list[tuple[str, "Kept"]] = field(default_factory=list)
    containers: list[tuple[str, Any, Any]] = field(default_factory=list)
    generators: list[tuple[str, Callable[[], Any]]] = field(default_factory=list)
    contents: list[Content] = field(default_factory=list)
    watched: list[tuple[str, Any, dict[str, Any]]] = field(default_factory=list)


class Kept:
    """The dictionaries of a module, as they were when one of them last changed.

    Args:
        module: the module.
        sharded: leave out the parameters, among which FSDP2 puts parts and gathered ones.
    """

    def __init__(self, module: nn.Module, sharded: bool) -> None:
        self.module, found = module, vars(module)
        names = [key for key in found if key not in _INTERNAL]
        self._values = operator.itemgetter("training", *names, "training")  # of one name it is no tuple
        self._containers = [found, *(found[name] for name in _FILLED[sharded:])]
        self._copies = [each.copy() for each in self._containers]
        self._state, self._sizes = self._now(), [*map(len, self._containers)]
        # Attributes that may change although the module still has the same object.
        self.attributes = [(key, found[key]) for key in names if not is_constant(found[key])]

    def _now(self) -> list[Any]:
        # Without a loop in Python: each step asks this of every module several times.
        found, *filled, _ = self._containers
        return [*self._values(found), *chain.from_iterable(map(operator.methodcaller("values"), filled))]

    def has_changed(self) -> bool:
        """Whether any entry is another object than it was."""
        if self._sizes != [*map(len, self._containers)]:
            return True
        try:
            return not all(map(operator.is_, self._now(), self._state))
        except KeyError:  # one has gone and another one come
            return True

    def restore(self) -> None:
        """Put back every entry, if any has changed."""
        if self.has_changed():
            for each, copy in zip(self._containers, self._copies, strict=True):
                refill(each, copy)


class Walk:
    """Goes through all that a model keeps, each thing once.

    Args:
        trained: the ids of parameters that are left out.
        before: the latest walk; None: there is none.
        sharded: whether FSDP2 shards the model.
    """

    def __init__(self, trained: set[int], before: "Walk | None", sharded: bool) -> None:
        self.seen, self.trained_ids, self._sharded = Seen(), trained, sharded
        self._known = {} if before is None else {id(kept.module): kept for _, kept in before.seen.modules}
        self._arrays_before = {} if before is None else before._arrays
        self._arrays: dict[int, Tensor] = {}  # large ones, as tensors
        self._plain: set[int] = set()  # the ids of what can be put back, with all that is in it
        self.tensors: list[tuple[str, Tensor]] = []
        self.trained, self.lazy = 0, False  # bytes; and whether a lazy module has been left out
        self.unknown: list[tuple[str, str]] = []  # where, and of which class
        self._met: set[int] = set()

    def has_changed(self) -> bool:
        """Whether another walk would find other things, or things that only a walk can look at."""
        seen = self.seen
        return (
            bool(self.lazy or seen.generators)
            or any(kept.has_changed() for _, kept in seen.modules)
            or not all(is_same(value, before) for _, value, before in seen.containers)
            or not all(is_same(attributes_of(value), before) for _, value, before in seen.watched)
        )

    def start(self, model: nn.Module) -> None:
        """Walk through all of a model."""
        self.modules("", model)
        self._known, self._arrays_before = {}, {}  # which may hold outputs of earlier steps

    def modules(self, path: str, model: nn.Module) -> None:
        """Walk through a model that is found at `path`."""
        for name, module in model.named_modules(prefix=path):
            if id(module) in self._met:
                continue
            self._met.add(id(module))
            # What a lazy module makes of itself in its first forward stays. (torch types the method for a
            # protocol that only lazy modules meet.)
            lazy = isinstance(module, LazyModuleMixin) and module.has_uninitialized_params()  # type: ignore[misc]
            self.lazy |= lazy
            if isinstance(module, _WRAPPERS) or lazy:
                continue
            if isinstance(module, ScriptModule):  # Python sees nothing of what it keeps
                self.seen.generators.append((name, state_of_script(module)))
            else:
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
        """Look at one value under an attribute of a module, and at all that is in it."""
        where = f"{module}.{key}" if module else key
        todo = [value]  # no recursion: lists may be linked
        for value in todo:
            if type(value) in ATOMS:
                continue
            if isinstance(value, nn.Module):
                self.modules(where, value)
                continue
            if id(value) in self._met:
                continue
            self._met.add(id(value))
            if isinstance(value, Tensor):
                # FSDP2 frees the memory of parameters that it has gathered. And a tensor with a graph was
                # made by a forward, and is not written to.
                parameter = isinstance(value, nn.Parameter)
                gathered = parameter and self._sharded and not isinstance(value, DTensor)
                mine = id(value) not in self.trained_ids and not gathered
                if mine and (parameter or not value.requires_grad):
                    self.tensors.append((where, value))
            elif (view := self._array(value)) is not None:
                self.tensors.append((where, view))
            elif (put_back := state_of(value)) is not None:
                self.seen.generators.append((module, put_back))
            elif isinstance(value, Iterator):
                self.unknown.append((where, type(value).__name__))
            else:
                if isinstance(value, CONTAINERS):
                    self.seen.containers.append((module, value, shallow(value)))
                if isinstance(value, HOLDERS):
                    todo.extend(each for each in entries_of(value) if type(each) not in ATOMS)
                todo.extend(self._object(module, where, value))

    def _array(self, value: Any) -> Tensor | None:
        """Return a huge array as a tensor, which is copied only if the first forward changes it.

        Others are copied each time, since nothing shows a later change.
        """
        huge = isinstance(value, np.ndarray) and value.nbytes > contents.ALLOWANCE
        if not huge or not value.flags.writeable:
            return None
        view = self._arrays_before.get(id(value))
        if view is None:
            try:
                view = torch.from_numpy(value)
            except (TypeError, ValueError):  # of a kind that PyTorch has not
                return None
        self._arrays[id(value)] = view
        return view

    def _object(self, module: str, where: str, value: Any) -> Iterable[Any]:
        """Keep the attributes of an object, or watch them; return those that are to be looked at."""
        found = attributes_of(value)
        if found is None or is_foreign(value):
            return ()
        if id(value) not in self._plain:
            parts = plain_parts(value, self._plain)
            if parts is None:
                self.seen.watched.append((where, value, found))
                return ()
            self._plain |= parts
        if hasattr(value, "__dict__"):
            self.seen.containers.append((module, vars(value), dict(vars(value))))
        if slots_of(type(value)):
            self.seen.generators.append((module, lambda: fill_slots(value, found)))
        return found.values()
