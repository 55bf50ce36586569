"""What forwards change in a model besides gradients, and how it is undone."""

import warnings
from collections.abc import Iterable
from dataclasses import replace

from torch import Tensor, nn

from composer_sassha.common.contents import Contents
from composer_sassha.common.sharding import is_sharded
from composer_sassha.common.values import attributes_of, is_same, refill
from composer_sassha.common.walk import Seen, Walk


class SideEffects:
    """Remembers a model, so that what a forward changes in it can be undone.

    Covered are the buffers and the parameters that are not trained (in value, shape, dtype and presence), the
    attributes of all modules, lists, dictionaries and objects of plain data in them, arrays, and random
    number generators. Attributes are compared by identity, large tensors by PyTorch's version counter and
    address; see `Contents` for what is copied. If something in a module cannot be put back, all of the module
    is left as it is, and that is said once: a cache restored without its flag would be worse than none.
    A write through `.data` into a large tensor, or into an array above `contents.ALLOWANCE`, is not noticed
    if it first comes after the first step.

    Args:
        model: the model; wrapped for data-parallel training, compiled, or neither.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._contents = Contents()
        self._walk: Walk | None = None  # the latest
        self._named: set[str] = set()

    def take(self, trained: Iterable[Tensor] | None = None, start: bool = False, learn: bool = True) -> Seen:
        """Return what the model is now.

        Args:
            trained: parameters that are left alone. Default: those that require a gradient.
            start: a step begins. Default: False.
            learn: a forward may have run since the last call. Default: True.
        """
        if trained is None:
            trained = (p for p in self.model.parameters() if p.requires_grad)
        walk, ids = self._walk, {id(p) for p in trained}
        if walk is None or walk.trained_ids != ids or walk.has_changed():
            walk = self._walk = Walk(ids, walk, is_sharded(self.model))
            walk.start(self.model)
            for where, kind in walk.unknown:
                self._name(where, f"is a {kind}, whose position cannot be put back")
        contents = self._contents.take(walk.tensors, walk.trained, start, learn)
        return replace(walk.seen, contents=contents)

    def tensors(self, seen: Seen) -> list[Tensor]:
        """Return the tensors that `restore` may write into."""
        return [content.tensor for content in seen.contents if content.copy is not None]

    def settle(self, seen: Seen) -> None:
        """Take the model for unchanged since `seen`; see `Contents.settle`."""
        self._contents.settle(seen.contents)

    def restore(self, seen: Seen) -> None:
        """Make the model what it was."""
        lost = dict.fromkeys(
            self._contents.lost(seen.contents),
            "is a large tensor that no forward had changed before, or one of a class that cannot be copied",
        )
        for where, value, before in seen.watched:
            if not is_same(attributes_of(value), before):
                lost[where] = f"is a {type(value).__name__} that a forward changes"
        for where, what in lost.items():
            self._name(where, what)
        left = {where.rpartition(".")[0] for where in lost}
        for module, kept in seen.modules:
            if module not in left:
                kept.restore()
        for module, value, before in seen.containers:
            if module not in left:
                refill(value, before)
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
