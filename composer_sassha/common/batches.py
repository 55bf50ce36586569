"""Batches of any type: copy them, count and cut their samples; and the bare model that takes them."""

import contextlib
import copy
import math
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor, nn
from torch._dynamo import OptimizedModule
from torch.nn.parallel import DistributedDataParallel
from torch.overrides import TorchFunctionMode

from composer_sassha.common.validate import SettingError
from composer_sassha.common.values import attributes_of

_ARRAYS = (Tensor, np.ndarray)


class Indivisible(ValueError):
    """A batch whose samples cannot be counted or cut; the message says why, without an owner."""


@contextlib.contextmanager
def must_divide(what: str, advice: str) -> Iterator[None]:
    """Re-raise `Indivisible` as SettingError: what needs a part of a batch, why there is none, what to do."""
    try:
        yield
    except Indivisible as error:
        raise SettingError(f"{what}, and {error}; {advice}") from error


class _EachTensor(TorchFunctionMode):
    """Makes `copy.deepcopy` call a function for every tensor."""

    def __init__(self, of: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.of = of

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.__deepcopy__:
            return self.of(args[0])
        return func(*args, **kwargs or {})


def writable(tensor: Tensor) -> Tensor:
    """Return a copy of a tensor, or itself if it requires a gradient: autograd allows no writes to it."""
    return tensor if tensor.requires_grad else tensor.clone()


def copied(batch: Any, of: Callable[[Tensor], Any] = writable, known: dict[int, Any] | None = None) -> Any:
    """Return a copy of a batch of any type, because a forward may edit the one that it is given.

    All containers are new. Plain `deepcopy` copies the whole storage of a microbatch that is a view, and
    refuses tensors with a graph. A part that cannot be copied, such as an open file, is shared.

    Args:
        batch: tensors in containers of any type and depth.
        of: returns what stands for a tensor; `shared` is the tensor itself. Default: `writable`, a copy.
        known: the copies of parts by their id, for `deepcopy`.
    """
    known = {} if known is None else known
    copies = dict(known)  # a failed deepcopy leaves half-filled containers
    try:
        with _EachTensor(of):
            found = copy.deepcopy(batch, copies)
    except Exception as error:  # a class may raise anything
        if isinstance(batch, Tensor) or isinstance(error, MemoryError):
            raise
        known[id(batch)] = batch  # a part may refer to the whole
        parts = {key: copied(part, of, known) for key, part in _members(batch).items()}
        with contextlib.suppress(Exception):
            known[id(batch)] = _with_members(batch, parts) if parts else batch
        return known[id(batch)]
    known.update(copies)
    return found


def shared(tensor: Tensor) -> Tensor:
    """Return the tensor itself; see `copied`."""
    return tensor


class Version(NamedTuple):
    """A tensor, and how many in-place writes it has seen; see `copied`."""

    tensor: Tensor
    writes: int

    @classmethod
    def of(cls, tensor: Tensor) -> "Version":
        """Return the present version of a tensor."""
        return cls(tensor, 0 if tensor.is_inference() else tensor._version)


def _members(batch: Any) -> dict[Any, Any]:
    """Return the parts of a container by key, index or attribute; {} if the batch is no container."""
    if isinstance(batch, Mapping):
        return dict(batch)
    if isinstance(batch, (tuple, list)):
        return dict(enumerate(batch))
    if isinstance(batch, (*_ARRAYS, nn.Module, type)) or callable(batch):
        return {}
    return attributes_of(batch) or {}


def _with_members(batch: Any, members: Mapping[Any, Any]) -> Any:
    """Return a container of the same type with other parts; see `_members`."""
    if isinstance(batch, (tuple, list)):
        items = list(members.values())
        return type(batch)(*items) if hasattr(batch, "_fields") else type(batch)(items)
    if isinstance(batch, Mapping) and not isinstance(batch, MutableMapping):
        return type(batch)(members)  # type: ignore[call-arg]  # as MappingProxyType takes it
    chosen: Any = copy.copy(batch)
    if isinstance(batch, Mapping) and not isinstance(batch, dict):  # its copy may share what it stores
        own = getattr(chosen, "__dict__", {})
        own.update({name: dict(part) for name, part in own.items() if type(part) is dict})
    for key, value in members.items():
        if isinstance(batch, Mapping):
            chosen[key] = value
        else:
            object.__setattr__(chosen, key, value)  # a dataclass may be frozen
    return chosen


UNCHANGED = object()


def changes(before: Any, after: Any) -> Any:
    """Return `after` with `UNCHANGED` in place of the parts that are those of `before`; see `changed`.

    Args:
        before: `copied(batch, Version.of)` at an earlier time.
        after: the batch now.
    """
    if isinstance(before, Version):
        same = before.tensor is after and before.writes == Version.of(after).writes
        return UNCHANGED if same else after
    if after is before:
        return UNCHANGED
    old, new = _members(before), _members(after)
    if not new or type(before) is not type(after):
        return after
    found = {key: changes(old[key], part) if key in old else part for key, part in new.items()}
    if old.keys() == new.keys() and all(part is UNCHANGED for part in found.values()):
        return UNCHANGED
    return _with_members(after, found)


def changed(batch: Any, by: Any, of: Callable[[Any], Any] = lambda part: part) -> Any:
    """Return a batch with the changes that another one has seen.

    Args:
        batch: comes back itself if nothing has changed.
        by: what `changes` returned.
        of: makes a part of this batch out of a changed part.
    """
    if by is UNCHANGED:
        return batch
    ours, theirs = _members(batch), _members(by)
    if not ours or not theirs:
        return of(by)
    if isinstance(batch, list) and len(ours) < len(theirs):  # the first of a list of samples
        return _with_members(batch, {key: changed(part, theirs[key]) for key, part in ours.items()})
    return _with_members(
        batch, ours | {key: changed(ours.get(key), part, of) for key, part in theirs.items()}
    )


def size_of(batch: Any) -> int:
    """Return the number of samples of a batch: the first dimension of its tensors, on which all must agree.

    A list without tensors, such as one of numbers or strings, counts as a tensor.

    Raises:
        Indivisible: they do not agree, or there is none.
    """
    sizes = set(_rows(batch))
    if len(sizes) != 1:
        found = f"the first dimensions {sorted(sizes)}" if sizes else "no tensor with a first dimension"
        raise Indivisible(f"the batch has {found}")
    return sizes.pop()


def _rows(batch: Any) -> Iterator[int]:
    if isinstance(batch, _ARRAYS):
        if batch.ndim:
            yield len(batch)
    elif isinstance(batch, (tuple, list)) and batch and _lists_values(batch):
        yield len(batch)
    else:
        for part in _members(batch).values():
            yield from _rows(part)


def _lists_values(batch: Sequence[Any]) -> bool:
    """Whether a sequence holds no tensors, but values such as numbers, strings or None."""
    return not any(True for part in batch for _ in _rows(part))


def _alike(batch: Sequence[Any]) -> bool:
    """Whether the parts of a sequence may be samples: of one type, and tensors of one dtype and rank."""
    kinds = {(type(part), getattr(part, "dtype", None), getattr(part, "ndim", None)) for part in batch}
    return len(kinds) == 1 and not hasattr(batch, "_fields")


def select(batch: Any, index: slice | Tensor, size: float, inside: bool = False) -> Any:
    """Return some samples of a batch, in new containers.

    Each tensor and each list of values has one entry for each sample. A list of other things has one if its
    tensors do not: it lists the samples. As for Composer's microbatches, this comes first for a list inside
    of another container. Tensors without dimensions and values that stand alone stay as they are.

    Args:
        batch: tensors in containers of any type and depth.
        index: the samples to select.
        size: the number of samples in the batch.
        inside: whether the batch is a part of another one.

    Raises:
        Indivisible: a part of the batch has no entry for each sample.
    """

    def entries(batch: Any) -> list[Any]:
        where = index.tolist() if isinstance(index, Tensor) else range(len(batch))[index]
        return [batch[i] for i in where]

    if isinstance(batch, _ARRAYS):
        if batch.ndim and len(batch) != size:
            raise Indivisible(f"a tensor of shape {list(batch.shape)} has no row for each of {size} samples")
        if batch.ndim and isinstance(batch, np.ndarray) and isinstance(index, Tensor):
            return batch[index.tolist()]
        return batch[index] if batch.ndim else batch
    members = _members(batch)
    if not isinstance(batch, (tuple, list)):
        parts = {key: select(part, index, size, inside=True) for key, part in members.items()}
        cut = isinstance(batch, Mapping) or any(parts[key] is not part for key, part in members.items())
        return _with_members(batch, parts) if cut else batch
    values = _lists_values(batch)
    if values and batch and len(batch) != size:
        raise Indivisible(f"a list of {len(batch)} has no entry for each of {size} samples")
    lists = len(batch) == size and (values or _alike(batch))  # it may list samples
    if not (lists and (values or inside or all(isinstance(part, Mapping) for part in batch))):
        try:
            parts = {key: select(part, index, size, inside=True) for key, part in members.items()}
            return _with_members(batch, parts)
        except Indivisible:
            if not lists:
                raise
    return type(batch)(entries(batch))


@dataclass(frozen=True)
class Samples:
    """Counts and cuts the batches of one loader.

    Args:
        count: returns the number of samples in a batch. Default: `size_of`.
        split: returns the parts of a batch that have a given number of samples. Default: `select`.
    """

    count: Callable[[Any], float] = size_of
    split: Callable[[Any, int], Sequence[Any]] | None = None

    def parts(self, batch: Any, start: int, stop: int, size: float) -> list[tuple[Any, int]]:
        """Return some consecutive samples of a batch, as parts with their numbers of samples.

        Args:
            batch: the batch.
            start: the first sample; from 0 on, all are in one part.
            stop: the sample after the last.
            size: the number of samples in the batch.

        Raises:
            Indivisible: the batch cannot be cut so.
        """
        if start == 0 and stop >= size:
            return [(batch, stop)]
        if self.split is None:
            if not any(True for _ in _rows(batch)):
                raise Indivisible(f"a {type(batch).__name__} without tensors and lists cannot be cut")
            return [(select(batch, slice(start, stop), size), stop - start)]
        step = math.gcd(start, stop - start)
        parts = list(self.split(batch, step))[start // step : stop // step]
        counts = [self.count(part) for part in parts]
        if counts != [step] * ((stop - start) // step):
            raise Indivisible(f"its split_batch made parts of {counts} samples where {step} were asked for")
        return [(part, step) for part in parts]

    def first(self, batch: Any, count: int, size: float) -> Any:
        """Return the first samples of a batch; see `parts`."""
        ((part, _),) = self.parts(batch, 0, count, size)
        return part


def unwrapped(model: nn.Module) -> Any:
    """Return the model inside of DistributedDataParallel and torch.compile.

    A forward of the inner model leaves the wrappers' state alone: DDP's reducer, for instance, expects a
    backward after each of its forwards.
    """
    for wrapper, inner in ((OptimizedModule, "_orig_mod"), (DistributedDataParallel, "module")):
        if isinstance(model, wrapper):
            model = getattr(model, inner)
    return model
