"""Parameters of which every rank holds a part (FSDP2): the part, and the ranks that hold the others."""

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor


class Shards(NamedTuple):
    """The ranks among which parameters are sharded, and the number of the part that is here."""

    group: ProcessGroup
    part: int


def shards_of(params: Iterable[Tensor]) -> Shards | None:
    """Return who holds the parts of these parameters; None if they are whole.

    Raises:
        ValueError: some are sharded, and others not, or in another way.
    """
    found = {(p.device_mesh, p.placements) if isinstance(p, DTensor) else None for p in params}
    if not found - {None}:
        return None
    layout = found.pop()
    dims = [dim for dim, placement in enumerate(layout[1]) if placement.is_shard(0)] if layout else []
    if found or layout is None or len(dims) != 1 or any(p.is_partial() for p in layout[1]):
        raise ValueError(
            "all parameters of the optimizer must be sharded in one way, as FSDP2 does it (each along its "
            "first dimension, over one dimension of one mesh); other shardings are not supported"
        )
    mesh = layout[0]
    return Shards(mesh.get_group(dims[0]), mesh.get_local_rank(dims[0]))


def local(tensors: Iterable[Any]) -> list[Any]:
    """Return of each tensor the part that this rank holds, in the same memory; all else as it is."""
    found = list(tensors)
    if DTensor not in map(type, found):
        return found
    with torch.no_grad():
        return [t.to_local() if isinstance(t, DTensor) else t for t in found]


def is_sharded(model: nn.Module | None) -> bool:
    """Whether FSDP2 shards a model's parameters."""
    return model is not None and any(isinstance(module, FSDPModule) for module in model.modules())


def forget_copies(model: nn.Module | None) -> None:
    """Forget what autocast and FSDP2 have copied from the parameters: somebody has written into them."""
    torch.clear_autocast_cache()
    for module in model.modules() if model is not None else ():
        if isinstance(module, FSDPModule):
            module.reshard()
