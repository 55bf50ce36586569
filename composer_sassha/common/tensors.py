"""Operations on lists of tensors, in few kernels."""

import contextlib
import functools
from collections.abc import Iterator, Sequence
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


def global_norm(tensors: Sequence[Tensor], shards: dist.ProcessGroup | None = None) -> float:
    """Return the Euclidean norm over all tensors together, accumulated in at least float32.

    Args:
        tensors: any number.
        shards: the ranks that hold the other parts of the same tensors; None: the tensors are whole.

    Example:
        >>> global_norm([torch.tensor([3.0]), torch.tensor([[4.0]])])
        5.0
    """
    if not tensors:
        return 0.0
    norms = list(torch._foreach_norm(list(tensors), 2, dtype=wide_dtype(tensors)))
    if len({norm.device for norm in norms}) > 1:
        norms = [norm.to(norms[0].device) for norm in norms]
    (norm,) = euclidean_norms([torch.stack(norms)], shards)
    return norm


def euclidean_norms(vectors: Sequence[Tensor], shards: dist.ProcessGroup | None = None) -> list[float]:
    """Return the Euclidean norm of each vector; with `shards`, each of those ranks holds a part of it.

    Example:
        >>> euclidean_norms([torch.tensor([3.0, 4.0]), torch.tensor([2.0])])
        [5.0, 2.0]
    """
    norms = torch.stack([torch.linalg.vector_norm(vector) for vector in vectors])
    if shards is not None:
        dist.all_reduce(norms.square_(), group=shards)
        norms.sqrt_()
    return norms.tolist()


def inner_products(
    pairs: Sequence[tuple[Tensor, Tensor]], shards: dist.ProcessGroup | None = None
) -> list[float]:
    """Return the inner product of each pair of vectors; `shards` as in `euclidean_norms`.

    Example:
        >>> a, b = torch.tensor([1.0, 2.0]), torch.tensor([3.0, 4.0])
        >>> inner_products([(a, b), (a, a)])
        [11.0, 5.0]
    """
    products = torch.stack([torch.dot(a, b) for a, b in pairs])
    if shards is not None:
        dist.all_reduce(products, group=shards)
    return products.tolist()
