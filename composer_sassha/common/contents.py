"""Copies of a model's tensors, as few as will do."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.parameter import is_lazy

from composer_sassha.common.sharding import local
from composer_sassha.common.tensors import copy_into, copy_of

# A tensor of up to this many bytes is copied each time. No sign tells that it has changed: batch norm writes
# its statistics without counting a version.
SMALL = 2**18
# Larger ones are copied on the first step, up to this many bytes or twice the trained parameters' if that is
# more, and later only those that a forward has changed.
ALLOWANCE = 2**28

_PLAIN = (Tensor, nn.Parameter)


@dataclass(eq=False)
class Content:
    """A tensor of the model at one moment.

    Attributes:
        where: its place in the model, such as `encoder.running_mean`.
        tensor: the tensor.
        mark: changes when the content does, see `_mark`; None: the tensor is small, and always copied.
        copy: of its content; None: it is only watched.
    """

    where: str
    tensor: Tensor
    mark: Any
    copy: Tensor | None = None


@dataclass(eq=False)
class _Known:
    """Findings about the large tensor at one place."""

    latest: Content
    moves: bool = False  # a forward has changed it
    unmarked: bool = False  # a forward has changed it without a mark, as `.data` does
    tried: bool = False  # a forward has run


class Contents:
    """Takes and restores the contents of tensors, and learns which of the large ones forwards change."""

    def __init__(self) -> None:
        self._known: dict[str, _Known] = {}
        self._tensors: Sequence[tuple[str, Tensor]] = ()  # of the latest call
        self._judged: list[tuple[str, Tensor, bool]] = []  # these, and whether they are copied each time

    def take(
        self, tensors: Sequence[tuple[str, Tensor]], trained: int, start: bool, learn: bool
    ) -> list[Content]:
        """Return the contents of tensors, each with its place.

        Args:
            tensors: the tensors. The same list as in the latest call has the same tensors.
            trained: the size of the trained parameters in bytes.
            start: a step begins.
            learn: a forward may have run since the last call.
        """
        first, left = not self._known, max(ALLOWANCE, 2 * trained)
        known = self._known
        if start:
            self._known = {}  # without what has gone since
        if tensors is not self._tensors:
            self._judge(tensors)
        found, lacking = [], []
        for where, tensor, each_time in self._judged:
            now = Content(where, tensor, None if each_time else _mark(tensor))
            found.append(now)
            if each_time:
                lacking.append(now)
                continue
            size = _bytes(tensor)
            place = self._known[where] = known.get(where) or _Known(now, tried=not first)
            if learn:
                self._learn(place, now, start)
            if place.moves or (not place.tried and size <= left):
                left -= size
                before = place.latest
                if before.tensor is tensor and before.mark == now.mark and not place.unmarked:
                    now.copy = before.copy
                if now.copy is None and _is_writable(tensor):
                    lacking.append(now)
            place.latest = now
        copies = copy_of(local(now.tensor for now in lacking))
        for now, copy in zip(lacking, copies, strict=True):
            now.copy = copy
        return found

    def _judge(self, tensors: Sequence[tuple[str, Tensor]]) -> None:
        self._tensors, self._judged = tensors, []
        met: set[str] = set()
        for where, tensor in tensors:
            if is_lazy(tensor):
                self._tensors = ()  # look again: it may become an ordinary tensor
            elif tensor.is_inference():  # it has no version
                continue
            elif _bytes(tensor) <= SMALL and _is_writable(tensor):
                self._judged.append((where, tensor, True))
            else:
                while where in met:  # several in one list
                    where += "'"
                met.add(where)
                self._judged.append((where, tensor, False))

    def _learn(self, place: _Known, now: Content, start: bool = False) -> None:
        """Find out whether a forward has changed a tensor since it was looked at."""
        before = place.latest
        if before is now or before.tensor is not now.tensor:
            return
        changed = before.mark != now.mark
        if not place.tried and before.copy is not None and before.copy.dtype == now.tensor.dtype:
            differs = not torch.equal(before.copy, *local([now.tensor]))  # the one read-back
            place.unmarked = place.moves = differs and not changed
            changed = differs
        place.moves |= changed and not start
        place.tried = True

    def _has_changed(self, content: Content) -> bool:
        if content.mark is None:
            return True
        mark, place = _mark(content.tensor), self._known[content.where]
        self._learn(place, Content(content.where, content.tensor, mark))
        return mark != content.mark or (place.unmarked and place.latest.tensor is content.tensor)

    def lost(self, contents: Sequence[Content]) -> list[str]:
        """Return the places of the tensors that have changed and of which there is no copy."""
        return [c.where for c in contents if c.copy is None and self._has_changed(c)]

    def restore(self, contents: Sequence[Content]) -> None:
        """Put back the contents that have changed."""
        changed = [c for c in contents if c.copy is not None and self._has_changed(c)]
        targets, copies = [], []
        for content, part in zip(changed, local(c.tensor for c in changed), strict=True):
            copy = content.copy
            assert copy is not None
            if part.shape == copy.shape and part.dtype == copy.dtype:
                targets.append(part)
                copies.append(copy)
            else:  # a forward has resized it, or given it another dtype
                part.data = copy.clone()
        copy_into(targets, copies)
        self.settle(changed)

    def settle(self, contents: Sequence[Content]) -> None:
        """Take the tensors for what these contents are, whatever their marks say."""
        for content in contents:
            if content.mark is not None:
                content.mark = _mark(content.tensor)
                self._known[content.where].latest = content


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _mark(tensor: Tensor) -> Any:
    """Return what changes with a tensor's content: PyTorch's version counter, address, shape and dtype."""
    # A sharded tensor's part moves in memory without a change of its content.
    strided = type(tensor) in _PLAIN and tensor.layout == torch.strided and not tensor.is_nested
    return tensor._version, tensor.data_ptr() if strided else 0, tensor.shape, tensor.dtype


def _is_writable(tensor: Tensor) -> bool:
    """Whether a tensor can be copied, and supports in-place writes (it is not expanded or compressed)."""
    if type(tensor) not in _PLAIN and not isinstance(tensor, DTensor):
        return False  # of a class that may mean something else by a copy
    if tensor.layout == torch.sparse_coo:
        return True
    if tensor.layout != torch.strided or tensor.is_nested or tensor.is_quantized:
        return False
    return tensor.is_contiguous() or not any(
        stride == 0 and size > 1 for stride, size in zip(tensor.stride(), tensor.shape, strict=True)
    )
