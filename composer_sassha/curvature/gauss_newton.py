"""The Gauss-Newton-Bartlett estimator: squared gradients at labels drawn from the model."""

import warnings
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from composer_sassha.common.rng import generator
from composer_sassha.common.tensors import wide_dtype
from composer_sassha.curvature.gradients import Gradients, by_autograd

# The label of a position without a prediction, in F.cross_entropy and Hugging Face's models alike.
IGNORED = -100


def gauss_newton_diagonal(
    logits: Tensor,
    labels: Tensor,
    params: Sequence[Tensor],
    keys: Sequence[Sequence[int]],
    scale: float = 1.0,
    spread: float = 1.0,
    gradients: Gradients | None = None,
) -> list[Tensor]:
    """Estimate the Gauss-Newton matrix's diagonal as the mean over draws of `B * g * g` (Liu et al. 2024).

    g is the gradient of the mean cross-entropy over B predictions, at labels drawn from the softmax of their
    logits. Such gradients are independent, with mean zero. The mean of `B * g * g` is therefore the diagonal
    of `J^T (diag(p) - p p^T) J`, averaged over the predictions: the Hessian without the network's own second
    derivatives (Bartlett's identity). It is never negative. The true labels decide only which predictions
    count. The estimate takes first derivatives only, and is accumulated in at least float32.

    Args:
        logits: [N, classes, ...], with their graph, which is freed at the end.
        labels: class numbers [N, ...], -100 for positions that do not count; or probabilities
            [N, classes, ...].
        params: the parameters; the result has an entry for each.
        keys: one key per draw, see `rademacher`.
        scale: multiplies the loss, so that gradients in float16 do not underflow; divided out before
            squaring.
        spread: B is `spread` times the number of predictions here; for `gradients` that average over ranks.
        gradients: how to differentiate. Default: `by_autograd(params)`.

    Raises:
        ValueError: logits and labels do not fit.

    Example:
        >>> w = torch.zeros(2, requires_grad=True)  # two classes, equally likely: p (1 - p) is 1/4
        >>> gauss_newton_diagonal(w.expand(1, 2), torch.tensor([0]), [w], keys=[(0,)])
        [tensor([0.2500, 0.2500])]
    """
    counted = predictions(labels, logits.shape[1])
    if counted.shape != logits[:, 0].shape:
        raise ValueError(
            f"LazyHessian: labels of shape {tuple(labels.shape)} do not fit logits of shape "
            f"{tuple(logits.shape)}; for logits [N, classes, ...] they must be class numbers [N, ...]"
        )
    logits = logits.to(wide_dtype([logits]))
    probabilities = logits.detach().softmax(dim=1)
    gradients = by_autograd(params) if gradients is None else gradients
    root = (spread * counted.sum().to(logits.dtype)).sqrt()  # under the square it is B
    total = [torch.zeros_like(p, dtype=wide_dtype([p])) for p in params]
    for draw, key in enumerate(keys, start=1):
        drawn = draw_labels(probabilities, key).masked_fill_(~counted, IGNORED)
        loss = F.cross_entropy(logits, drawn, ignore_index=IGNORED) * (scale * root)
        grads = gradients(loss, draw < len(keys))
        wide = [grad.to(t.dtype) for grad, t in zip(grads, total, strict=True)]
        if scale != 1:
            wide = list(torch._foreach_div(wide, scale))
        torch._foreach_addcmul_(total, wide, wide)
    torch._foreach_div_(total, len(keys))
    return total


def predictions(labels: Tensor, classes: int | None = None) -> Tensor:
    """Return a mask of the predictions that count: labels in [0, classes), and all probabilities.

    What a model ignores is -100 by default, and often -1 or 255: none of these is a class.

    Args:
        labels: class numbers, or probabilities.
        classes: the number of classes; None: any.

    Example:
        >>> predictions(torch.tensor([2, -100, 0, 255]), classes=10)
        tensor([ True, False,  True, False])
    """
    if labels.is_floating_point():
        return torch.ones_like(labels[:, 0], dtype=torch.bool)
    counted = labels >= 0
    return counted if classes is None else counted & (labels < classes)


def draw_labels(probabilities: Tensor, key: Sequence[int]) -> Tensor:
    """Draw one class for every position from probabilities [N, classes, ...]; the key determines the draw."""
    # The largest of p / e, e exponential, is class c with probability p_c. torch.multinomial draws likewise,
    # but waits for the device and raises on NaN. Here a loss that overflowed must give an estimate that is
    # not finite, which the refresh notices and retries.
    noise = torch.empty_like(probabilities).exponential_(generator=generator(key, probabilities.device))
    return (probabilities / noise).argmax(dim=1)


def warn_of_divided_loss(loss: Tensor, logits: Tensor, labels: Tensor) -> None:
    """Warn if a loss is an n-th of the mean cross-entropy behind it, n a whole number from 2.

    A loop that accumulates gradients divides so. The estimators that evaluate logits, or the loss again,
    would then estimate the curvature of another loss than the one that is trained.
    """
    if not labels.is_floating_point():
        labels = labels.masked_fill(~predictions(labels, logits.shape[1]), IGNORED)
    with torch.no_grad():
        ratio = (F.cross_entropy(logits.to(loss.dtype), labels) / loss).item()
    if 1.5 < ratio < 1e6 and abs(ratio - round(ratio)) < 1e-3 * ratio:
        parts = round(ratio)
        warnings.warn(
            f"the loss is 1/{parts} of the mean cross-entropy of its logits, and the Hessian estimate is of "
            f"another loss; pass the mean loss, and its weight: optimizer.backward(loss, 1 / {parts})",
            stacklevel=2,
        )
