"""The ranks that share a model's gradient, and the collectives among them.

A process group may be there for other reasons than data parallelism: sweeps, ensembles, actors. So the plain
packages ask `sharing` which ranks train one model together, and none reads the world by itself.
"""

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.nn.parallel import DistributedDataParallel


@dataclass(frozen=True)
class Ranks:
    """The ranks that share the gradient of one model, with equal weights; by default this process alone.

    Args:
        groups: the process groups that they are the product of: one, or one for each dimension of a mesh.
        known: False if nothing says which ranks they are. This process is then taken to be alone.
    """

    groups: tuple[ProcessGroup, ...] = ()
    known: bool = True

    @property
    def size(self) -> int:
        """The number of these ranks."""
        return math.prod(group.size() for group in self.groups)

    @property
    def rank(self) -> int:
        """The number of this process among them; 0 if it is alone."""
        number = 0
        for group in self.groups:
            number = number * group.size() + group.rank()
        return number

    @property
    def members(self) -> set[int]:
        """The ranks of its groups, and this one, by their numbers in the world."""
        return {dist.get_rank()}.union(*map(dist.get_process_group_ranks, self.groups))

    @property
    def several(self) -> bool:
        """Whether there is more than one rank."""
        return self.size > 1

    def reduce_(self, tensor: Tensor, op: Any = dist.ReduceOp.SUM) -> Tensor:
        """Reduce a tensor over the ranks, in place and in one collective for each group, and return it."""
        if self.several:
            for group in self.groups:
                dist.all_reduce(tensor, op, group=group)
        return tensor

    def average_(self, tensor: Tensor) -> None:
        """Average a tensor over the ranks, in place."""
        if self.several:
            self.reduce_(tensor).div_(self.size)

    def any(self, condition: Tensor) -> bool:
        """Whether a condition, a tensor with one entry, holds on any rank; takes one small collective."""
        if self.several:
            condition = self.reduce_(condition.float(), dist.ReduceOp.MAX)
        return bool(condition.item())

    def broadcast_(self, tensor: Tensor) -> None:
        """Overwrite a tensor by that of rank 0."""
        for group in self.groups if self.several else ():
            dist.broadcast(tensor, src=dist.get_global_rank(group, 0), group=group)

    def broadcast_objects_(self, objects: list[Any]) -> None:
        """Overwrite the objects in a list by those of rank 0."""
        for group in self.groups:
            dist.broadcast_object_list(objects, src=dist.get_global_rank(group, 0), group=group)

    def __reduce__(self) -> tuple[Any, ...]:
        # A process group does not pickle, but its name says which one it is in every rank of a program. All
        # ranks are all ranks in another program too, of whatever size.
        names = [None if group is dist.group.WORLD else group.group_name for group in self.groups]
        return _restored, (names, self.known)


def _restored(names: list[str | None], known: bool) -> Ranks:
    groups = [
        world().groups if name is None else (dist.distributed_c10d._resolve_process_group(name),)
        for name in names
    ]
    return Ranks(tuple(group for each in groups for group in each), known)


ALONE = Ranks()


def world() -> Ranks:
    """Return all ranks; this process alone if there is no process group."""
    group = dist.group.WORLD if dist.is_available() and dist.is_initialized() else None
    return ALONE if group is None else Ranks((group,))


# The argument `process_group`: these ranks, this one alone (False), or what the model says (None).
Group = ProcessGroup | Ranks | Literal[False] | None


def given_ranks(owner: str, process_group: Group) -> Ranks | None:
    """Return the ranks that an argument `process_group` gives; None if it gives none.

    Raises:
        TypeError: it is anything else; the message begins with `owner`.
    """
    if process_group is None or isinstance(process_group, Ranks):
        return process_group
    if process_group is False:
        return ALONE
    if isinstance(process_group, ProcessGroup):
        return Ranks((process_group,))
    raise TypeError(
        f"{owner}: process_group={process_group!r} is not allowed; it must be a process group that this rank "
        "belongs to, False for this rank alone, or None to ask the model"
    )


def data_parallel(model: nn.Module | None) -> list[DistributedDataParallel]:
    """Return the model if it is wrapped for data-parallel training, or its parts that are.

    The wrapper is a part where it has been compiled, or where only some of the layers are in it.
    """
    if isinstance(model, DistributedDataParallel):
        return [model]
    if model is None or not world().groups:  # without a process group there is none to look for
        return []
    return [module for module in model.modules() if isinstance(module, DistributedDataParallel)]


def sharing(given: Ranks | None, model: nn.Module | None, mesh: Ranks | None = None) -> Ranks:
    """Return the ranks that share the gradient of this process's model.

    Args:
        given: what the caller says; None: what the model says.
        model: a DistributedDataParallel says its process group.
        mesh: the ranks over which FSDP2 averages the gradient; None: the parameters are whole.

    Raises:
        ValueError: the model averages over ranks that are not among the given ones, or its parts over
            different ones.
    """
    if not world().groups:
        return ALONE
    found = {Ranks((ddp.process_group,)) for ddp in data_parallel(model)}
    found |= set() if mesh is None else {mesh}
    if given is None:
        if len(found) > 1:
            raise ValueError(
                "SharpnessAwareOptimizer: parts of the model average their gradients over different ranks; "
                "give each part an optimizer of its own"
            )
        return found.pop() if found else Ranks(known=not world().several)
    for own in found:
        # DDP's group may be a part of the given one, over which the loop averages. FSDP2's estimate needs
        # exactly its mesh.
        if not own.members <= given.members or (own == mesh and own.size != given.size):
            raise ValueError(
                f"SharpnessAwareOptimizer: process_group= of ranks {sorted(given.members)} is not allowed "
                f"for a model whose gradient ranks {sorted(own.members)} average (DistributedDataParallel, "
                "FSDP2); leave it out"
            )
    return given
