"""Squared gradients at the true labels: the cheapest of the estimators, and not one of the Hessian."""

from collections.abc import Sequence

import torch
from torch import Tensor

from composer_sassha.common.tensors import wide_dtype


def empirical_fisher_diagonal(grads: Sequence[Tensor], count: int | Tensor) -> list[Tensor]:
    """Return `B * g * g`, g the mean gradient of B predictions at their true labels.

    This is not an estimate of the Hessian, nor of the Fisher information, which takes labels drawn from the
    model: it says how large gradients are (Kunstner, Hennig, Balles 2019, arXiv 1905.12558). With independent
    predictions its mean is the mean of `g_i * g_i` over single predictions, which is the empirical Fisher's
    diagonal, plus (B - 1) times the square of the mean gradient. The second part goes to zero at a minimum,
    and outweighs the first one far from it. It is gathered in at least float32.

    Args:
        grads: the mean loss's gradients.
        count: the number of predictions B, >= 1.

    Example:
        >>> empirical_fisher_diagonal([torch.tensor([0.5, -1.0])], count=4)
        [tensor([1., 4.])]
    """
    wide = [grad.to(wide_dtype([grad])) for grad in grads]
    squares = list(torch._foreach_mul(wide, wide))
    torch._foreach_mul_(squares, count if isinstance(count, int) else count.to(squares[0].dtype))
    return squares
