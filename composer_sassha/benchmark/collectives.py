"""The collectives of one step on several ranks: what they are for, and their bytes."""

from collections import Counter
from typing import Any, NamedTuple

import torch.distributed as torch_dist
from composer.models import ComposerModel
from torch import Tensor
from torch.optim import Optimizer

from composer_sassha.benchmark.steps import Kind, is_wrapped
from composer_sassha.common.tensors import wide_dtype


class Collective(NamedTuple):
    """One collective operation.

    Args:
        purpose: what it is for, such as `gradient`.
        size: bytes that each rank hands in.
    """

    purpose: str
    size: int


def traffic(
    optimizer: Optimizer, model: ComposerModel, kind: Kind, *, scaled: bool = False
) -> list[Collective]:
    """List the collectives of one step in a Trainer on several ranks, under DDP.

    An ascent gradient stays on its rank unless `sync_ascent`. With `sync_ascent`, and with a partial ascent,
    rank 0's buffers are broadcast twice. A perturbation that mixes gradients averages the mixture, and its
    state entry, in place of the gradients. A refresh averages the diagonal.

    Args:
        optimizer: the Trainer's.
        model: what it trains, not wrapped for DDP.
        kind: of the step.
        scaled: whether a gradient scaler looks for overflows, as in amp_fp16.

    >>> import torch
    >>> from composer.models import ComposerClassifier
    >>> model = ComposerClassifier(torch.nn.Linear(3, 2), num_classes=2)
    >>> traffic(torch.optim.SGD(model.parameters(), lr=0.1), model, Kind())[1]
    Collective(purpose='gradient', size=32)
    """
    wrapper: Any = optimizer  # ours, wherever a step perturbs
    perturbation: Any = getattr(wrapper, "perturbation", None)
    ascends = kind.perturbs and perturbation.ascends
    sync_ascent = ascends and wrapper.sync_ascent
    params = [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]
    entries, flat = sum(p.numel() for p in params), wide_dtype(params).itemsize
    passes = 2 if ascends else 1

    found = [Collective("batch size", 8)] * passes
    again = ascends and (wrapper.sync_ascent or wrapper.partial_ascent)
    found += [Collective("buffers", size) for size in _buffers(model)] * (2 if again else 1)
    if sync_ascent:
        found += [Collective("ascent gradient", size) for size in bucket_sizes(model)]
    if ascends and perturbation.mixes and not sync_ascent:
        vectors = 2 if perturbation.remembers else 1
        found += [Collective("update", flat * (vectors * entries + len(params)))]
    else:
        found += [Collective("gradient", size) for size in bucket_sizes(model)]
    if kind.refreshes:
        found += [Collective("Hessian", flat * (entries + len(params)))]
    if scaled and is_wrapped(optimizer):
        found += [Collective("overflow", 4)] * passes
    found += [Collective("loss", 4), Collective("samples", 8), Collective("time", 4)]
    return found + _metrics(model)


def bucket_sizes(model: ComposerModel) -> list[int]:
    """Return the bytes of DDP's buckets, in the order in which a backward pass fills them."""
    # DDP sorts them by the order of the gradients in its first pass, which is the reverse of the forward's.
    params: list[Any] = [p for p in model.parameters() if p.requires_grad][::-1]
    limits = [torch_dist._DEFAULT_FIRST_BUCKET_BYTES, 25 * 2**20]  # DDP's defaults, which the Trainer takes
    buckets, _ = torch_dist._compute_bucket_assignment_by_size(params, limits, [False] * len(params))
    return [sum(params[i].nbytes for i in bucket) for bucket in buckets]


def _buffers(model: ComposerModel) -> list[int]:
    """Return the bytes of the buffers that DDP broadcasts before a step, one collective for each dtype."""
    sizes: Counter[Any] = Counter()
    for buffer in model.buffers():
        sizes[buffer.dtype] += buffer.nbytes
    return [*sizes.values()]


def _metrics(model: ComposerModel) -> list[Collective]:
    """List what torchmetrics gathers after every step, state by state."""
    metrics = model.get_metrics(is_train=True).values()
    sizes: list[int] = []
    for state in (state for metric in metrics for state in metric.metric_state.values()):
        if isinstance(state, Tensor):
            # A barrier, the shapes unless they are known, and the values.
            sizes += [0, 8 * state.ndim, state.nbytes] if state.ndim else [0, state.nbytes]
    return [Collective("metrics", size) for size in sizes]
