"""Hutchinson's estimator of the Hessian's diagonal, by reverse-over-reverse differentiation."""

from collections.abc import Sequence

import torch
from torch import Tensor

from composer_sassha._tensors import wide_dtype
from composer_sassha.curvature.probes import rademacher


def hutchinson_diagonal(
    grads: Sequence[Tensor], params: Sequence[Tensor], keys: Sequence[Sequence[int]]
) -> list[Tensor]:
    """Estimate diag H as the mean over probes of `z * (H z)`, z Rademacher (Bekas et al. 2007).

    The estimate is unbiased, and exact where H is diagonal. With n probes its variance in entry i is the sum
    of `H_ij^2` over j != i, divided by n. It is gathered in at least float32.

    Args:
        grads: the loss's gradients, made with `create_graph=True`; their graph is freed.
        params: the parameters, one for each gradient.
        keys: one key per probe, see `rademacher`.

    Example:
        >>> w = torch.tensor([1.0, 2.0], requires_grad=True)
        >>> grads = torch.autograd.grad((w**3).sum(), [w], create_graph=True)
        >>> hutchinson_diagonal(grads, [w], keys=[(0,)])
        [tensor([ 6., 12.])]
    """
    curved = [i for i, grad in enumerate(grads) if grad.requires_grad]  # where the loss is linear, H is zero
    wide = [wide_dtype([p]) for p in params]
    total = [torch.zeros_like(p, dtype=dtype) for p, dtype in zip(params, wide, strict=True)]
    if not curved:
        return total
    for sample, key in enumerate(keys, start=1):
        probe = rademacher(params, key)
        products = torch.autograd.grad(
            [grads[i] for i in curved],
            params,
            [probe[i] for i in curved],
            retain_graph=sample < len(keys),
            materialize_grads=True,
        )
        wide_products = [product.to(dtype) for product, dtype in zip(products, wide, strict=True)]
        wide_probe = [z.to(dtype) for z, dtype in zip(probe, wide, strict=True)]
        torch._foreach_addcmul_(total, wide_probe, wide_products, 1 / len(keys))
    return total
