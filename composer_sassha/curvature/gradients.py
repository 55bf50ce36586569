"""The gradients of a loss: by autograd for whole parameters, by an ordinary backward for sharded ones."""

import contextlib
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from composer_sassha.common.sharding import local
from composer_sassha.common.validate import SettingError
from composer_sassha.curvature.graph import leaves

# Takes a loss and whether to keep its graph, and returns the gradient of every parameter, zero if unused.
Gradients = Callable[[Tensor, bool], Sequence[Tensor]]


def by_autograd(params: Sequence[Tensor]) -> Gradients:
    """Return a function that differentiates with respect to these parameters and leaves their `grad` alone.

    Example:
        >>> w = torch.tensor([1.0, 2.0], requires_grad=True)
        >>> by_autograd([w])((w**2).sum(), False)
        (tensor([2., 4.]),)
    """

    def gradients(loss: Tensor, retain_graph: bool) -> Sequence[Tensor]:
        return torch.autograd.grad(loss, params, retain_graph=retain_graph, materialize_grads=True)

    return gradients


@contextlib.contextmanager
def without_hooks(leaves: Sequence[Tensor]) -> Iterator[None]:
    """Disable the leaves' own hooks while gradients are computed that no `grad` receives.

    torch.autograd.grad would run them, and the backward that follows would run them again.
    """
    hooks = [(p, p._backward_hooks) for p in leaves if p._backward_hooks]
    try:
        for p, _ in hooks:
            p._backward_hooks = None
        yield
    finally:
        for p, hook in hooks:
            p._backward_hooks = hook


class ByBackward:
    """Differentiates by a backward, in which FSDP2 averages over the ranks and leaves each rank its part.

    FSDP2 reduces gradients in hooks of the backward, which torch.autograd.grad does not run.

    Args:
        params: sharded parameters. Their `grad` is restored afterwards, and that of all other leaves.
        weight: the weight of this rank's loss in the average.
    """

    def __init__(self, params: Sequence[Tensor], weight: float) -> None:
        self.params, self.weight = params, weight
        self.used: set[int] = set()  # indices of the parameters that have had a gradient

    def __call__(self, loss: Tensor, retain_graph: bool) -> Sequence[Tensor]:
        """Return the gradient of every parameter's part here, averaged over the ranks; zero if unused."""
        everyone = [*self.params, *leaves(loss, besides=self.params)]
        kept = [p.grad for p in everyone]
        try:
            for p in everyone:
                p.grad = None
            (loss * self.weight).backward(retain_graph=retain_graph)
            found = local(p.grad for p in self.params)
        finally:
            for p, grad in zip(everyone, kept, strict=True):
                p.grad = grad
        self.used |= {i for i, grad in enumerate(found) if grad is not None}
        parts = local(self.params)
        return [torch.zeros_like(p) if g is None else g for p, g in zip(parts, found, strict=True)]


def scaled_gradients(
    loss: Tensor, wrt: Sequence[Tensor], scale: float, retain_graph: bool = False
) -> tuple[Tensor | None, ...]:
    """Return the gradients, of a loss times `scale` and divided by it again; None where there is none."""
    scaled = loss if scale == 1 else loss * scale
    grads = torch.autograd.grad(scaled, wrt, retain_graph=retain_graph, allow_unused=True)
    return grads if scale == 1 else tuple(None if grad is None else grad / scale for grad in grads)


@contextlib.contextmanager
def reentrant_checkpoints_refused() -> Iterator[None]:
    """Say what to do about activation checkpoints that can only be differentiated by `loss.backward()`."""
    try:
        yield
    except RuntimeError as error:
        if "use_reentrant=True" not in str(error):
            raise
        raise SettingError(
            "LazyHessian: a Hessian refresh cannot go through reentrant activation checkpoints; pass "
            "use_reentrant=False to torch.utils.checkpoint (Hugging Face: "
            "gradient_checkpointing_kwargs={'use_reentrant': False})"
        ) from error
