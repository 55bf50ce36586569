"""The stand-in for a loss: its backward delivers gradients that were computed before."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor


def stand_in(
    loss: Tensor,
    leaves: Sequence[Tensor],
    grads: list[Tensor],
    retained: Mapping[Tensor, Tensor],
    weigh: Callable[[Tensor], None],
) -> Tensor:
    """Return the loss's value with a backward that hands each leaf its gradient.

    Args:
        loss: one number.
        leaves: the parameters and other leaves that the loss uses; a parameter that it does not use must stay
            unconnected, as DDP's find_unused_parameters expects.
        grads: their gradients, which the backward takes from the end.
        retained: the gradients of activations that retain theirs.
        weigh: called first with the weight that the backward brings along.
    """

    def multiply(weight: Tensor) -> None:
        weight = weight.reshape(())  # only now is it known
        weigh(weight)
        grads[:] = _times(grads, weight)
        for activation, grad in retained.items():
            activation.grad = grad * weight.to(grad.device)

    chain = loss.detach()
    for leaf in leaves:
        chain = _Delivery.apply(chain, leaf, grads)  # type: ignore[no-untyped-call]  # torch's has no types
    weighed: Tensor = _Weighing.apply(chain, multiply)  # type: ignore[no-untyped-call]  # likewise
    return weighed


def _times(tensors: list[Tensor], weight: Tensor) -> list[Tensor]:
    """Return the tensors times a weight, on whatever device each one is."""
    devices = {t.device for t in tensors}
    if len(devices) < 2:
        return list(torch._foreach_mul(tensors, weight))
    weights = {device: weight.to(device) for device in devices}
    return [t * weights[t.device] for t in tensors]


class _Weighing(torch.autograd.Function):
    """The end of a chain that stands in for a loss: its backward weighs the gradients computed before."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, weigh: Callable[[Tensor], None]) -> Tensor:
        ctx.weigh = weigh
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, weight: Tensor) -> tuple[Tensor, None]:
        weigh, ctx.weigh = ctx.weigh, None  # the loss may be kept for its value; the gradients may not
        if weigh is None:
            raise RuntimeError("the loss of a refresh pass can be differentiated once")
        weigh(weight)
        return weight, None


class _Delivery(torch.autograd.Function):
    """A link of that chain: its backward hands one leaf its gradient, the last of a list.

    It reaches a parameter through the ordinary hooks, those of DistributedDataParallel among them, which a
    backward with create_graph=True does not. And the last parameter comes first, as in an ordinary backward:
    DistributedDataParallel sorts its buckets by what it sees in the first.
    """

    @staticmethod
    def forward(ctx: Any, loss: Tensor, leaf: Tensor, grads: list[Tensor]) -> Tensor:
        ctx.grads = grads
        return loss.view_as(loss)

    @staticmethod
    def backward(ctx: Any, weight: Tensor) -> tuple[Tensor, Tensor, None]:
        grads, ctx.grads = ctx.grads, None
        return weight, grads.pop(), None
