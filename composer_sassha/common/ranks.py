"""The rank of this process, and small collectives that work without a process group too."""

import torch
import torch.distributed as dist
from torch import Tensor


def rank() -> int:
    """Return the number of this process; 0 if it is the only one."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def world_size() -> int:
    """Return the number of processes."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def several() -> bool:
    """Whether there is more than one rank."""
    return world_size() > 1


def any_rank(condition: Tensor) -> bool:
    """Whether a condition, a tensor with one entry, holds on any rank; takes one small collective."""
    if several():
        condition = condition.to(torch.float32)
        dist.all_reduce(condition, dist.ReduceOp.MAX)
    return bool(condition.item())


def average_(tensor: Tensor) -> None:
    """Average a tensor over the ranks, in place and in one collective."""
    if several():
        dist.all_reduce(tensor)
        tensor.div_(world_size())
