"""Replaces the gradients by the update that a perturbation makes of flat vectors."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from composer_sassha.common.ranks import average_, several
from composer_sassha.common.sharding import local
from composer_sassha.common.tensors import copy_into, flatten, unflatten
from composer_sassha.perturbations import Perturbation


def flat_gradient(params: Sequence[Tensor]) -> Tensor:
    """Copy the gradients into one vector; a missing gradient counts as zero."""
    return flat([p.grad for p in params], params)


def flat(tensors: Sequence[Tensor | None], params: Sequence[Tensor]) -> Tensor:
    """Copy one tensor per parameter into one vector: of sharded parameters, this rank's part."""
    return flatten(local(tensors), like=local(params))


def combine(
    perturbation: Perturbation,
    params: Sequence[Tensor],
    ascent: Tensor,
    *,
    average: bool,
    shards: ProcessGroup | None = None,
) -> Tensor | None:
    """Replace the gradients at w + e by the perturbation's update.

    Args:
        perturbation: makes the update of the two gradients.
        params: the optimizer's trainable parameters.
        ascent: their gradient at w.
        average: average the update over the ranks, because the gradients are this rank's own.
        shards: the ranks that hold the other parts of sharded parameters.

    Returns:
        The vector to keep as a state entry, averaged likewise, or None.
    """
    if not params:
        return None
    update, remembered = perturbation.combine(ascent, flat_gradient(params), shards)
    used = [p.grad is not None for p in params]
    if average and several():
        # One collective for everything, every rank with the same sizes. The counts tell which parameters any
        # rank has used: the others must stay without a gradient, or the optimizer would step on zeros.
        parts = [update, update.new_tensor(used), *([] if remembered is None else [remembered])]
        everything = torch.cat(parts)
        average_(everything)
        update, counts, *rest = everything.split([part.numel() for part in parts])
        used = [count > 0 for count in counts.tolist()]
        remembered = rest[0] if rest else None
    _set_gradient(params, update, used)
    return remembered


def reuse(
    perturbation: Perturbation,
    params: Sequence[Tensor],
    remembered: Sequence[Tensor | None],
    *,
    shards: ProcessGroup | None = None,
) -> None:
    """Replace the gradients of a step without an ascent by the perturbation's update.

    Args:
        perturbation: makes the update of the gradients and the state entries.
        params: the optimizer's trainable parameters.
        remembered: the perturbation's state entry for each; None counts as zero.
        shards: the ranks that hold the other parts of sharded parameters.
    """
    if not params:
        return
    update = perturbation.reuse(flat_gradient(params), flat(remembered, params), shards)
    _set_gradient(params, update, [p.grad is not None for p in params])


def _set_gradient(params: Sequence[Tensor], update: Tensor, used: Sequence[bool]) -> None:
    pieces = unflatten(update, local(params))
    chosen = [(p, piece) for p, piece, use in zip(params, pieces, used, strict=True) if use]
    for p, _ in chosen:
        if p.grad is None:  # only another rank has used it
            p.grad = torch.empty_like(p)
    copy_into(local(p.grad for p, _ in chosen), [piece for _, piece in chosen])
