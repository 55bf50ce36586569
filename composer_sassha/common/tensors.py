"""Operations on lists of tensors, in few kernels."""

import contextlib
import functools
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from itertools import compress

import torch
import torch.distributed as dist
from torch import Tensor


def copy_into(targets: Sequence[Tensor], tensors: Sequence[Tensor]) -> None:
    """Copy each tensor into its target, dtype by dtype.

    One call over targets of several dtypes writes wrong values on CUDA (pytorch/pytorch issue 173383).
    """
    dtypes = [target.dtype for target in targets]
    with torch.no_grad():
        for dtype in dict.fromkeys(dtypes):
            chosen = [same == dtype for same in dtypes]
            torch._foreach_copy_([*compress(targets, chosen)], [*compress(tensors, chosen)])


def copy_of(tensors: Sequence[Tensor], dtype: torch.dtype | None = None) -> list[Tensor]:
    """Return a copy of every tensor, in another dtype if one is given."""
    copies = [torch.empty_like(t, dtype=dtype) for t in tensors]
    copy_into(copies, tensors)
    return copies


def add_scaled_(
    targets: Sequence[Tensor], tensors: Sequence[Tensor], scale: Tensor, *, spare: bool = False
) -> None:
    """Add `scale * tensors` to the targets, in place and without reading the scale back.

    A scale of 0 adds nothing, even where a tensor is not finite.

    Args:
        targets: any number, of any devices and dtypes.
        tensors: one for each, in its shape.
        scale: one number.
        spare: the tensors may be overwritten, which saves memory. Default: False.

    Example:
        >>> w = torch.zeros(2)
        >>> add_scaled_([w], [torch.tensor([3.0, 4.0])], torch.tensor(0.5))
        >>> add_scaled_([w], [torch.tensor([torch.inf, torch.nan])], torch.tensor(0.0))
        >>> w
        tensor([1.5000, 2.0000])
    """
    alike = defaultdict(list)
    for target, tensor in zip(targets, tensors, strict=True):
        alike[target.device, target.dtype, tensor.dtype].append((target, tensor))
    for (device, dtype, own), pairs in alike.items():
        into, added = [target for target, _ in pairs], [tensor for _, tensor in pairs]
        factor = scale.to(device, wide_dtype(pairs[0]))
        # NaN times 0 is NaN, but its bits as an integer times 0 are 0, in one kernel for all tensors.
        integer = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[own.itemsize]
        bits, applied = [t.view(integer) for t in added], (factor != 0).to(integer)
        if spare:
            torch._foreach_mul_(bits, applied)
        if device.type == "cpu" or factor.dtype not in (dtype, own):
            # Rounds once, as `add(..., alpha=)` does, and scales half precision in float32.
            for target, bit, tensor in zip(into, bits, added, strict=True):
                kept = tensor if spare else (bit * applied).view(own)
                target.addcmul_(kept, factor.expand_as(kept))
        else:  # there the loop would be a kernel per tensor
            own_copies = added if spare else [t.view(own) for t in torch._foreach_mul(bits, applied)]
            torch._foreach_mul_(own_copies, factor)
            torch._foreach_add_(into, own_copies)


@contextlib.contextmanager
def restored(tensors: Sequence[Tensor]) -> Iterator[None]:
    """Restore the tensors' present values when the block ends."""
    values = copy_of(tensors)
    try:
        yield
    finally:
        copy_into(tensors, values)


def as_dtype(tensors: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Return tensors of one dtype in another; the list itself if they have that dtype already."""
    return tensors if tensors[0].dtype == dtype else copy_of(tensors, dtype)


def flatten(tensors: Sequence[Tensor | None], like: Sequence[Tensor]) -> Tensor:
    """Copy tensors with the shapes of `like` into one flat tensor of `wide_dtype`; None counts as zero."""
    if not like:
        return torch.empty(0)
    dtype, device = wide_dtype(like), like[0].device
    pieces = [
        torch.zeros(p.numel(), dtype=dtype, device=device) if t is None else t.reshape(-1).to(device, dtype)
        for t, p in zip(tensors, like, strict=True)
    ]
    return torch.cat(pieces)


def unflatten(flat: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """View a flat tensor as tensors with the shapes of `like`."""
    pieces = flat.split([t.numel() for t in like])
    return [piece.view(t.shape) for piece, t in zip(pieces, like, strict=True)]


def wide_dtype(tensors: Sequence[Tensor]) -> torch.dtype:
    """Return the dtype to accumulate in: the widest among the tensors, and at least float32."""
    return functools.reduce(torch.promote_types, {t.dtype for t in tensors}, torch.float32)


def read(values: Iterable[float | Tensor]) -> list[float]:
    """Return numbers as floats; the tensors among them, with one entry each, in one read-back.

    Example:
        >>> read([1.5, torch.tensor(2.0), torch.tensor([3.0])])
        [1.5, 2.0, 3.0]
    """
    found = list(values)
    tensors = [value.detach().reshape(()) for value in found if isinstance(value, Tensor)]
    if not tensors:
        return found  # type: ignore[return-value]  # no tensors
    device, dtype = tensors[0].device, wide_dtype(tensors)
    numbers = iter(torch.stack([t.to(device, dtype) for t in tensors]).tolist())
    return [next(numbers) if isinstance(value, Tensor) else value for value in found]


def global_norm(tensors: Sequence[Tensor], shards: dist.ProcessGroup | None = None) -> Tensor:
    """Return the Euclidean norm over all tensors together, accumulated in at least float32.

    It is not read back: a tensor with one entry, on the first tensor's device.

    Args:
        tensors: any number.
        shards: the ranks that hold the other parts of the same tensors; None: the tensors are whole.

    Example:
        >>> global_norm([torch.tensor([3.0]), torch.tensor([[4.0]])])
        tensor(5.)
    """
    if not tensors:
        return torch.zeros(())
    norms = list(torch._foreach_norm(list(tensors), 2, dtype=wide_dtype(tensors)))
    if len({norm.device for norm in norms}) > 1:
        norms = [norm.to(norms[0].device) for norm in norms]
    return _norms([torch.stack(norms)], shards)[0]


def euclidean_norms(vectors: Sequence[Tensor], shards: dist.ProcessGroup | None = None) -> list[float]:
    """Return the Euclidean norm of each vector, read back at once.

    Args:
        vectors: at least one.
        shards: the ranks that hold the other parts of the same vectors; None: the vectors are whole.

    Example:
        >>> euclidean_norms([torch.tensor([3.0, 4.0]), torch.tensor([2.0])])
        [5.0, 2.0]
    """
    norms: list[float] = _norms(vectors, shards).tolist()
    return norms


def _norms(vectors: Sequence[Tensor], shards: dist.ProcessGroup | None) -> Tensor:
    norms = torch.stack([torch.linalg.vector_norm(vector) for vector in vectors])
    if shards is not None:
        dist.all_reduce(norms.square_(), group=shards)
        norms.sqrt_()
    return norms


def inner_products(
    pairs: Sequence[tuple[Tensor, Tensor]], shards: dist.ProcessGroup | None = None
) -> list[float]:
    """Return the inner product of each pair of vectors, read back at once; `shards` as in `euclidean_norms`.

    Example:
        >>> a, b = torch.tensor([1.0, 2.0]), torch.tensor([3.0, 4.0])
        >>> inner_products([(a, b), (a, a)])
        [11.0, 5.0]
    """
    products = torch.stack([torch.dot(a, b) for a, b in pairs])
    if shards is not None:
        dist.all_reduce(products, group=shards)
    return products.tolist()
