"""Random probe vectors that need no saved state."""

from collections.abc import Sequence

import torch
from torch import Tensor

from composer_sassha.common.rng import generator
from composer_sassha.common.tensors import unflatten


def rademacher(like: Sequence[Tensor], key: Sequence[int]) -> list[Tensor]:
    """Draw +1 or -1 with equal probability for every entry; one draw serves all tensors.

    Args:
        like: at least one tensor; the probe has their shapes, dtypes and devices.
        key: integers that determine the draw, for instance (seed, step, rank, microbatch, sample), so that no
            generator has to be saved. CPU and GPU draw different numbers from one key.

    Example:
        >>> rademacher([torch.zeros(4), torch.zeros(1, 2)], key=(0, 7))
        [tensor([-1.,  1.,  1., -1.]), tensor([[ 1., -1.]])]
    """
    device = like[0].device
    size = sum(t.numel() for t in like)
    bits = torch.randint(2, (size,), generator=generator(key, device), device=device, dtype=torch.int8)
    signs = bits.mul_(2).sub_(1)
    if {(t.dtype, t.device) for t in like} == {(like[0].dtype, device)}:
        return unflatten(signs.to(like[0].dtype), like)
    return [z.to(t) for z, t in zip(unflatten(signs, like), like, strict=True)]
