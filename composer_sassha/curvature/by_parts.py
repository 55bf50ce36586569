"""Operations whose kernels have no second derivative, computed by parts that have one."""

import contextlib
import functools
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch._decomp import decomposition_table
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from composer_sassha.common.replaced import replaced
from composer_sassha.common.tensors import wide_dtype
from composer_sassha.curvature.float16 import NormsInFloat32


@contextlib.contextmanager
def differentiable_twice(float16: bool = False) -> Iterator[None]:
    """Compute operations in forwards within this context so that they can be differentiated twice.

    Values and gradients are the kernels' own up to rounding. Where a kernel's second derivative is missing
    since it is zero almost everywhere, it is zero here.

    Args:
        float16: the model computes in float16: see `NormsInFloat32`.

    Example:
        >>> w = torch.tensor([1.0], requires_grad=True)
        >>> with differentiable_twice():
        ...     (g,) = torch.autograd.grad(F.hardsigmoid(w) * w, w, create_graph=True)
        >>> torch.autograd.grad(g, w)
        (tensor([0.3333]),)
    """
    # The functions themselves are replaced, since a TorchFunctionMode does not see what an activation
    # checkpoint recomputes within autograd.
    with sdpa_kernel(SDPBackend.MATH), replaced(_REPLACEMENTS), contextlib.ExitStack() as stack:
        if float16:
            stack.enter_context(NormsInFloat32())
        yield


def _hardsigmoid(x: Tensor) -> Tensor:
    return (F.relu6(x.to(wide_dtype([x])) + 3) / 6).to(x.dtype)


def _hardsigmoid_(x: Tensor) -> Tensor:
    return x.copy_(_hardsigmoid(x))


def _weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    return v * (g / torch.norm_except_dim(v, 2, dim))  # the fused kernel's second derivative is wrong


def _cdist(x: Tensor, y: Tensor, p: float = 2.0, compute_mode: int | None = None) -> Tensor:
    return _length(x.unsqueeze(-2) - y.unsqueeze(-3), p)


def _pdist(x: Tensor, p: float = 2.0) -> Tensor:
    i, j = torch.triu_indices(len(x), len(x), offset=1, device=x.device)
    return _length(x[i] - x[j], p)


def _length(apart: Tensor, p: float) -> Tensor:
    """Return the p-norm over the last dimension; its derivatives at zero are zero."""
    same = (apart == 0).all(-1)
    length: Tensor = torch.linalg.vector_norm(apart.masked_fill(same[..., None], 1), p, -1)
    return length.masked_fill(same, 0)


def _embedding_bag(kernel: Callable[..., Any]) -> Callable[..., Any]:
    def wrapped(
        weight: Tensor,
        indices: Tensor,
        offsets: Tensor,
        scale_grad_by_freq: bool = False,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        if scale_grad_by_freq:  # such gradients are those of no function
            return kernel(weight, indices, offsets, True, *args, **kwargs)
        return _bags(weight, indices, offsets, *args, **kwargs)

    return wrapped


def _bags(
    weight: Tensor,
    indices: Tensor,
    offsets: Tensor,
    mode: int = 0,
    sparse: bool = False,
    per_sample_weights: Tensor | None = None,
    include_last_offset: bool = False,
    padding_idx: int | None = None,
) -> tuple[Tensor, ...]:
    """Return the sums, means or maxima (modes 0, 1, 2) of bags of rows, and the bag of each row."""
    starts = offsets[:-1] if include_last_offset else offsets
    bag = torch.bucketize(torch.arange(len(indices), device=starts.device), starts.long(), right=True) - 1
    if padding_idx is not None and padding_idx >= 0:
        kept = indices != padding_idx
        indices, bag = indices[kept], bag[kept]
        per_sample_weights = None if per_sample_weights is None else per_sample_weights[kept]
    rows = F.embedding(indices, weight, sparse=sparse)
    if per_sample_weights is not None:
        rows = rows * per_sample_weights[:, None]
    empty = rows.new_zeros(len(starts), weight.shape[1])
    if mode == 2:
        where = bag[:, None].expand_as(rows)
        bags = empty.scatter_reduce(0, where, rows, "amax", include_self=False)
    else:
        bags = empty.index_add(0, bag, rows)
    if mode == 1:
        bags = bags / torch.bincount(bag, minlength=len(starts)).clamp(min=1)[:, None]
    return bags, bag, bag, bag


def _without_cudnn(recur: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(recur)
    def wrapped(*args: Any) -> Any:
        with torch.backends.cudnn.flags(enabled=False):
            return recur(*args)

    return wrapped


def _grid_sampler(kernel: Callable[..., Tensor]) -> Callable[..., Tensor]:
    by_parts = _decomposed(torch.ops.aten.grid_sampler_2d.default)(kernel)

    def wrapped(input: Tensor, grid: Tensor, *args: Any) -> Tensor:
        return (by_parts if input.ndim == 4 else kernel)(input, grid, *args)

    return wrapped


def _decomposed(operation: Any) -> Callable[[Any], Any]:
    return lambda kernel: decomposition_table.get(operation, kernel)


def _always(function: Callable[..., Any]) -> Callable[[Any], Any]:
    return lambda kernel: function


# Where torch's Python code looks the kernels up, with what takes their place there.
_PLACES: list[tuple[Any, str, Callable[[Any], Any]]] = [
    (torch._C._nn, "hardsigmoid", _always(_hardsigmoid)),
    (torch._C._nn, "hardsigmoid_", _always(_hardsigmoid_)),
    (torch._C._nn, "multi_margin_loss", _decomposed(torch.ops.aten.multi_margin_loss.default)),
    (torch, "_weight_norm", _always(_weight_norm)),
    (sys.modules.get("torch.nn.utils.weight_norm"), "_weight_norm", _always(_weight_norm)),
    (torch, "embedding_bag", _embedding_bag),
    (torch._VF, "cdist", _always(_cdist)),
    (torch, "pdist", _always(_pdist)),
    (F, "pdist", _always(_pdist)),
    (torch, "grid_sampler", _grid_sampler),
    *[(torch._VF, name, _without_cudnn) for name in ("lstm", "gru", "rnn_tanh", "rnn_relu")],
]
_REPLACEMENTS = [place for place in _PLACES if hasattr(*place[:2])]  # they are PyTorch's own, and may move
