"""Parameters sharded by FSDP2: the local part, and the ranks that hold the other parts."""

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from composer_sassha.common.ranks import Ranks


class Shards(NamedTuple):
    """The ranks among which parameters are sharded, and the number of this rank's part.

    Args:
        group: those that hold the other parts of the same copy.
        part: the number of this rank's part.
        ranks: all ranks over which FSDP2 averages the gradient: with HSDP, those of the other copies too.
    """

    group: ProcessGroup
    part: int
    ranks: Ranks


def shards_of(params: Iterable[Tensor]) -> Shards | None:
    """Return the ranks that hold the parts of these parameters; None if the parameters are whole.

    Raises:
        ValueError: the parameters are not all sharded in the same way, along the first dimension.
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
    groups = tuple(mesh.get_all_groups())
    return Shards(groups[dims[0]], mesh.get_local_rank(dims[0]), Ranks(groups))


def local(tensors: Iterable[Any]) -> list[Any]:
    """Replace every sharded tensor by this rank's part, in the same memory; all else stays as it is."""
    found = list(tensors)
    if DTensor not in map(type, found):
        return found
    with torch.no_grad():
        return [t.to_local() if isinstance(t, DTensor) else t for t in found]


def is_sharded(model: nn.Module | None) -> bool:
    """Whether FSDP2 shards a model's parameters."""
    return model is not None and any(isinstance(module, FSDPModule) for module in model.modules())


def forget_copies(model: nn.Module | None) -> None:
    """Drop the copies that autocast and FSDP2 keep of parameters that have been written to.

    Without this, the next forward would still use the old values: autocast caches casts of leaves, and FSDP2
    keeps gathered parameters until it reshards.
    """
    torch.clear_autocast_cache()
    for module in model.modules() if model is not None else ():
        if isinstance(module, FSDPModule):
            module.reshard()
