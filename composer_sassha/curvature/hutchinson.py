"""Hutchinson's estimator of the Hessian's diagonal, by reverse-over-reverse differentiation."""

import re
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction

from composer_sassha.common.tensors import wide_dtype
from composer_sassha.common.validate import SettingError
from composer_sassha.curvature.graph import nodes
from composer_sassha.curvature.probes import rademacher

# The messages of PyTorch, torchvision, custom operators and compiled code where a gradient has no derivative.
NO_DERIVATIVE = re.compile(
    r"derivative for '?(?:aten::)?(\w+)[^']*'? is not implemented"
    r"|double backwards? on (\w+) not supported"
    r"|backward through (\S+) but no autograd formula was registered"
    r"|(torch\.compile) with aot_autograd does not currently support double backward"
)


def differentiable_gradients(loss: Tensor, params: Sequence[Tensor]) -> tuple[Tensor | None, ...]:
    """Return the loss's gradients with their graph; None for parameters that the loss does not use.

    A function written in Python can cut that graph silently: its backward computes outside of autograd, or is
    marked `once_differentiable`. Its part of the Hessian would be missing. A function whose forward computes
    the gradient already, so that its backward only multiplies, is not detected. PyTorch's second derivative
    of `weight_norm` is wrong (2.6 to 2.11), and counts as missing outside of `differentiable_twice`.

    Raises:
        SettingError: a function cuts the graph.

    Example:
        >>> w = torch.tensor([1.0, 2.0], requires_grad=True)
        >>> differentiable_gradients((w**3).sum(), [w])
        (tensor([ 3., 12.], grad_fn=<MulBackward0>),)
    """
    broken: list[str] = []
    graph = nodes(loss)
    if any(node.name().startswith("WeightNormInterface") for node in graph):
        raise _no_second_derivative("weight_norm")
    written_in_python = [node for node in graph if isinstance(node, BackwardCFunction)]
    handles = [node.register_hook(_watch(node.name(), broken)) for node in written_in_python]
    # A factor of 1 that requires a gradient: every gradient is linear in it, hence must depend on it. Where a
    # gradient does not, the function that returned it has cut the graph.
    factor = torch.ones_like(loss, requires_grad=True)
    try:
        grads = torch.autograd.grad(loss, params, factor, create_graph=True, allow_unused=True)
    finally:
        for handle in handles:
            handle.remove()
    if broken:
        raise _no_second_derivative(broken[0].removesuffix("Backward"))
    return grads


def hutchinson_diagonal(
    grads: Sequence[Tensor], params: Sequence[Tensor], keys: Sequence[Sequence[int]]
) -> list[Tensor]:
    """Estimate diag H as the mean over probes of `z * (H z)`, z Rademacher (Bekas et al. 2007).

    The estimate is unbiased, and exact where H is diagonal. With n probes its variance in entry i is the sum
    of `H_ij^2` over j != i, divided by n. It is accumulated in at least float32.

    Args:
        grads: the loss's gradients, made with `create_graph=True`; their graph is freed.
        params: the parameters, one for each gradient.
        keys: one key per probe, see `rademacher`.

    Raises:
        SettingError: an operation has no second derivative.

    Example:
        >>> w = torch.tensor([1.0, 2.0], requires_grad=True)
        >>> grads = torch.autograd.grad((w**3).sum(), [w], create_graph=True)
        >>> hutchinson_diagonal(grads, [w], keys=[(0,)])
        [tensor([ 6., 12.])]
    """
    wide = [wide_dtype([p]) for p in params]
    total = [torch.zeros_like(p, dtype=dtype) for p, dtype in zip(params, wide, strict=True)]
    for sample, key in enumerate(keys, start=1):
        probe = rademacher(params, key)
        products = hessian_product(grads, params, probe, retain_graph=sample < len(keys))
        wide_products = [product.to(dtype) for product, dtype in zip(products, wide, strict=True)]
        wide_probe = [z.to(dtype) for z, dtype in zip(probe, wide, strict=True)]
        torch._foreach_addcmul_(total, wide_probe, wide_products, 1 / len(keys))
    return total


def hessian_product(
    grads: Sequence[Tensor | None],
    params: Sequence[Tensor],
    vectors: Sequence[Tensor],
    retain_graph: bool = False,
) -> Sequence[Tensor]:
    """Return H v, the derivative of `g . v`; zero for parameters that `g . v` does not depend on.

    Args:
        grads: the loss's gradients, made with `create_graph=True`; None where the loss uses none.
        params: the parameters, one for each gradient.
        vectors: v, in the shapes of the parameters.
        retain_graph: keep the gradients' graph for another product.

    Raises:
        SettingError: an operation has no second derivative.

    Example:
        >>> w = torch.tensor([1.0, 2.0], requires_grad=True)
        >>> grads = torch.autograd.grad((w**3).sum(), [w], create_graph=True)
        >>> hessian_product(grads, [w], [torch.tensor([1.0, -1.0])])
        (tensor([  6., -12.]),)
    """
    curved = [  # where the loss is linear, H is zero
        (grad, vector)
        for grad, vector in zip(grads, vectors, strict=True)
        if grad is not None and grad.requires_grad
    ]
    if not curved:
        return [torch.zeros_like(p) for p in params]
    try:
        return torch.autograd.grad(
            [grad for grad, _ in curved],
            params,
            [vector for _, vector in curved],
            retain_graph=retain_graph,
            materialize_grads=True,
        )
    except RuntimeError as error:
        found = NO_DERIVATIVE.search(str(error))
        if found is None:
            raise
        name = found[found.lastindex or 0].removesuffix(".default")
        raise _no_second_derivative(name.removesuffix("_backward").lstrip("_")) from error


def _watch(name: str, broken: list[str]) -> Callable[..., None]:
    """Return a hook that appends `name` to `broken` if the backward of its function cuts the graph."""

    def hook(made: Sequence[Tensor | None], given: Sequence[Tensor | None]) -> None:
        if not any(grad is not None and grad.requires_grad for grad in given):
            return  # a later backward without a graph, or cut before this function
        grads = [grad for grad in made if grad is not None]
        # The results of `once_differentiable` require a gradient, but their node is an "Error", which raises
        # when it is differentiated.
        marked = [
            grad
            for grad in grads
            if grad.grad_fn is not None and grad.grad_fn.name().rpartition("::")[2] == "Error"
        ]
        constant = [grad for grad in grads if not grad.requires_grad]
        if any(grad.any() for grad in marked + constant):  # a gradient of zero is right as a constant
            broken.append(name)

    return hook


class NoSecondDerivative(SettingError):
    """An operation of the model that cannot be differentiated twice; `operation` is its name."""

    operation = ""


def _no_second_derivative(name: str) -> NoSecondDerivative:
    error = NoSecondDerivative(
        f"LazyHessian: estimator='hutchinson' differentiates twice, and {name} has no second derivative; use "
        "estimator='gauss_newton' (for a cross-entropy), 'finite_difference' (for smooth networks) or "
        f"'empirical_fisher' (for any loss), or another kernel in place of {name}"
    )
    error.operation = name
    return error
