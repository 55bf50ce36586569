"""Squared gradients at the true labels: the cheapest estimator, though not one of the Hessian."""

from collections.abc import Sequence

import torch
from torch import Tensor

from composer_sassha.common.tensors import wide_dtype


def empirical_fisher_diagonal(grads: Sequence[Tensor], count: int | Tensor) -> list[Tensor]:
    """Return `B * g * g`, g the mean gradient of B predictions at their true labels.

    This estimates neither the Hessian nor the Fisher information, whose labels are drawn from the model. It
    measures the size of the gradients (Kunstner, Hennig, Balles 2019, arXiv 1905.12558). With independent
    predictions its mean is the empirical Fisher's diagonal, the mean of `g_i * g_i` over single predictions,
    plus (B - 1) times the square of the mean gradient. The second part vanishes at a minimum, and outweighs
    the first one far from it. The result is computed in at least float32.

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
