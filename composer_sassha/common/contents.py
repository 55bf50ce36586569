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

# A tensor of up to this many bytes is always copied when it has changed.
SMALL = 2**20
# Larger ones are copied on the first step, up to this many bytes or twice the trained parameters' if that is
# more, and later only those that a forward has changed.
ALLOWANCE = 2**28


@dataclass(eq=False)
class Content:
    """A tensor of the model at one moment.

    Attributes:
        where: its place in the model, such as `encoder.running_mean`.
        tensor: the tensor.
        mark: changes when its content does, see `_mark`.
        copy: of its content; None: it is only watched.
    """

    where: str
    tensor: Tensor
    mark: Any
    copy: Tensor | None


@dataclass(eq=False)
class _Known:
    """What is known of the tensor at one place: its latest content, and whether forwards change it."""

    latest: Content
    moves: bool = False  # a forward has changed it
    unmarked: bool = False  # a forward has changed it by `.data`, which leaves the version alone
    tried: bool = False  # a forward has run


class Contents:
    """Takes and restores the contents of tensors, and learns which ones forwards change.

    A copy is made of what is new, small or known to move, and is used again while the tensor is unchanged. On
    the first step the copies tell whether a forward has written without counting a version, as `.data` does.
    """

    def __init__(self) -> None:
        self._known: dict[str, _Known] = {}

    def take(self, tensors: Sequence[tuple[str, Tensor]], trained: int, start: bool) -> list[Content]:
        """Return the contents of tensors, each with its place.

        Args:
            tensors: the tensors.
            trained: the size of the trained parameters in bytes.
            start: no forward has run since the last call.
        """
        first, left = not self._known, max(ALLOWANCE, 2 * trained)
        known, self._known = self._known, {}
        found, lacking = [], []
        for where, tensor in tensors:
            if tensor.is_inference() or is_lazy(tensor):  # neither has a version
                continue
            now = Content(where, tensor, _mark(tensor), None)
            place = self._known[where] = known.get(where) or _Known(now, tried=not first)
            same = place.latest.tensor is tensor and place.latest.mark == now.mark
            self._learn(place, now, start)
            size = tensor.numel() * tensor.element_size()
            wanted = size <= SMALL or place.moves or place.unmarked or (not place.tried and size <= left)
            if wanted and _is_writable(tensor):
                left -= size if size > SMALL else 0
                if same and not place.unmarked:
                    now.copy = place.latest.copy
                if now.copy is None:
                    lacking.append(now)
            place.latest = now
            found.append(now)
        copies = copy_of(local(now.tensor for now in lacking))
        for now, copy in zip(lacking, copies, strict=True):
            now.copy = copy
        return found

    def _learn(self, place: _Known, now: Content, start: bool) -> None:
        """Find out whether a forward has changed a tensor since it was looked at."""
        before, (part,) = place.latest, local([now.tensor])
        if before is now or before.tensor is not now.tensor:
            return
        changed = before.mark != now.mark
        if not place.tried and before.copy is not None and before.copy.dtype == part.dtype:
            # The one read-back. FSDP2 counts versions and puts other parts in place in its first forward.
            differs = not torch.equal(before.copy, part)
            place.unmarked, changed = differs and not changed, differs
        place.moves |= changed and not start
        place.tried = True

    def lost(self, contents: Sequence[Content]) -> list[str]:
        """Return the places of the tensors that have changed and of which there is no copy."""
        return [c.where for c in contents if c.copy is None and self._has_changed(c)]

    def restore(self, contents: Sequence[Content]) -> None:
        """Put back the contents that have changed."""
        changed = [c for c in contents if c.copy is not None and self._has_changed(c)]
        parts = local(c.tensor for c in changed)
        targets, copies = [], []
        for content, part in zip(changed, parts, strict=True):
            copy = content.copy
            assert copy is not None
            if part.shape == copy.shape and part.dtype == copy.dtype:
                targets.append(part)
                copies.append(copy)
            else:  # a forward has resized it, or given it another dtype
                part.data = copy.clone()
        copy_into(targets, copies)
        for content in changed:
            content.mark = _mark(content.tensor)
            if (place := self._known.get(content.where)) is not None:
                place.latest = content

    def settle(self, contents: Sequence[Content]) -> None:
        """Take the tensors for unchanged, after autograd's versions have been set back."""
        for content in contents:
            content.mark = _mark(content.tensor)
            self._known[content.where].latest = content

    def _has_changed(self, content: Content) -> bool:
        now = Content(content.where, content.tensor, _mark(content.tensor), None)
        place = self._known.get(content.where)
        if place is None or place.latest.tensor is not content.tensor:
            return bool(now.mark != content.mark)
        self._learn(place, now, start=False)
        return place.unmarked or bool(now.mark != content.mark)


def _mark(tensor: Tensor) -> Any:
    """Return what changes with a tensor's content: PyTorch's version counter, address, shape and dtype."""
    # A sharded tensor's part moves in memory without a change of its content.
    address = tensor.data_ptr() if type(tensor) in (Tensor, nn.Parameter) and _is_strided(tensor) else None
    return tensor._version, address, tensor.shape, tensor.dtype


def _is_strided(tensor: Tensor) -> bool:
    return tensor.layout == torch.strided and not (tensor.is_nested or tensor.is_quantized)


def _is_writable(tensor: Tensor) -> bool:
    """Whether a tensor can be copied, and supports in-place writes (it is not expanded or compressed)."""
    if not isinstance(tensor, DTensor) and type(tensor) not in (Tensor, nn.Parameter):
        return False  # of a class that may mean something else by a copy
    if tensor.layout == torch.sparse_coo:
        return True
    return _is_strided(tensor) and not any(
        stride == 0 and size > 1 for stride, size in zip(tensor.stride(), tensor.shape, strict=True)
    )
