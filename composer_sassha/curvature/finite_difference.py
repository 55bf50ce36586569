"""Hutchinson's estimator with the Hessian-vector product as a difference of two gradients."""

import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from composer_sassha.common.tensors import restored
from composer_sassha.common.validate import SettingError
from composer_sassha.curvature.gradients import Gradients, by_autograd
from composer_sassha.curvature.graph import nodes
from composer_sassha.curvature.probes import rademacher

# How the names of autograd nodes with a kink begin. There the gradient jumps, which spoils the difference.
KINKS = (
    *("Abs", "Clamp", "Hardshrink", "Hardsigmoid", "Hardswish", "Hardtanh", "LeakyRelu", "Max", "Min"),
    *("AdaptiveMaxPool", "Amax", "Amin", "FractionalMaxPool", "MkldnnMaxPool", "PreluKernel", "Relu"),
    *("RreluWithNoise", "Softshrink", "Sort", "Threshold", "Topk"),
)


def finite_difference_diagonal(
    grads: Sequence[Tensor],
    params: Sequence[Tensor],
    keys: Sequence[Sequence[int]],
    again: Callable[[], AbstractContextManager[Tensor]],
    gradients: Gradients | None = None,
    on_write: Callable[[], None] = torch.clear_autocast_cache,
) -> list[Tensor]:
    """Estimate diag H as the mean over probes of `z * (g(w + h z) - g(w)) / h`, z Rademacher.

    For smooth networks only: a kink such as ReLU's makes the difference wrong by more than its value, at any
    h. No second-order graph is built; each probe costs one more forward and backward. The parameters are
    displaced in place and restored by copy, also after an exception.

    h is `sqrt(eps) / 10` of the parameters' dtype, 3.5e-5 in float32. The truncation error is about `h / 2`
    times the third derivative applied to z twice, and grows with the number of parameters. The rounding error
    is `2 eps / h` times the gradient, and stays small compared with `H z`.

    Args:
        grads: the loss's gradients at w.
        params: the parameters, one for each gradient, float32 or float64.
        keys: one key per probe, see `rademacher`.
        again: returns a context in which the same loss has been computed again, at the parameters' present
            values, and can be differentiated.
        gradients: how to differentiate. Default: `by_autograd(params)`.
        on_write: called after every write to the parameters; drops cached copies of them. Default: clears
            autocast's cache.

    Raises:
        ValueError: a parameter is of lower precision than float32.

    Example:
        >>> w = torch.tensor([1.0, 2.0], requires_grad=True)
        >>> grads = torch.autograd.grad((w**3).sum(), [w])
        >>> from contextlib import nullcontext
        >>> again = lambda: nullcontext((w**3).sum())
        >>> (diagonal,) = finite_difference_diagonal(grads, [w], [(0,)], again)
        >>> diagonal.round(decimals=1)
        tensor([ 6., 12.])
    """
    eps = max(torch.finfo(p.dtype).eps for p in params)
    if eps > torch.finfo(torch.float32).eps:
        raise ValueError(
            "LazyHessian: estimator='finite_difference' needs parameters in float32 or float64: gradients of "
            "lower precision drown in the difference; use another estimator"
        )
    # Measured on convolutional networks and small GPT-2s of 1e3 to 4e5 parameters in float32: the estimate
    # was off by 0.2 to 0.5 % at this step, and by 3 to 13 % at 1e-3; at 1e-5 rounding began to show.
    step = eps**0.5 / 10
    gradients = by_autograd(params) if gradients is None else gradients
    total = [torch.zeros_like(p) for p in params]
    for key in keys:
        probe = rademacher(params, key)
        try:
            with restored(params):
                with torch.no_grad():
                    torch._foreach_add_(list(params), probe, alpha=step)
                on_write()  # else autocast would serve casts of w to the forward at w + h z
                with again() as loss:
                    displaced = gradients(loss, False)
        finally:
            on_write()
        differences = torch._foreach_sub(list(displaced), list(grads))
        torch._foreach_addcmul_(total, probe, list(differences), 1 / (step * len(keys)))
    return total


def refuse_half_precision(loss: Tensor) -> None:
    """Raise SettingError if any node of the loss's autograd graph computes in half precision."""
    dtypes = {made.dtype for node in nodes(loss) for made in node._input_metadata}
    for dtype in dtypes & {torch.float16, torch.bfloat16}:
        raise SettingError(
            f"LazyHessian: estimator='finite_difference' needs a model that computes in float32 or float64, "
            f"and this one computes in {dtype} (an autocast of its own?), whose errors drown the difference; "
            "use another estimator"
        )


def kinks(loss: Tensor) -> list[str]:
    """Return the names of the operations with kinks in a loss's autograd graph.

    Operations inside compiled code or reentrant checkpoints are not in the graph, hence not found.

    Example:
        >>> kinks(torch.ones(2, requires_grad=True).tanh().relu().sum())
        ['ReluBackward0']
    """
    return sorted({name for node in nodes(loss) if (name := node.name()).startswith(KINKS)})


def warn_of_kinks(loss: Tensor) -> None:
    """Warn if a loss's autograd graph has kinks, which spoil the difference."""
    found = kinks(loss)
    if found:
        warnings.warn(
            "LazyHessian: estimator='finite_difference' is for smooth networks, and this loss has kinks "
            f"({', '.join(found)}), which spoil the estimate; use estimator='hutchinson' or 'gauss_newton'",
            stacklevel=4,
        )
