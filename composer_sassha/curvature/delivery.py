"""The stand-in for a loss: its backward delivers gradients that were computed before."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


def stand_in(
    loss: Tensor, params: Sequence[Tensor], grads: list[Tensor], weigh: Callable[[Tensor], None]
) -> Tensor:
    """Return the loss's value with a backward that hands each parameter its gradient.

    Args:
        loss: one number.
        params: the parameters that the loss uses; others must stay unconnected, as DDP's
            find_unused_parameters expects.
        grads: their gradients, which `weigh` may replace and the backward takes from the end.
        weigh: called first with the weight that the backward brings along.
    """
    chain = loss.detach()
    for p in params:
        chain = _Delivery.apply(chain, p, grads)  # type: ignore[no-untyped-call]  # torch's has no types
    weighed: Tensor = _Weighing.apply(chain, weigh)  # type: ignore[no-untyped-call]
    return weighed


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
    """A link of that chain: its backward hands one parameter its gradient, the last of a list.

    It reaches the parameter through the ordinary hooks, those of DistributedDataParallel among them, which a
    backward with create_graph=True does not. And the last parameter comes first, as in an ordinary backward:
    DistributedDataParallel sorts its buckets by what it sees in the first.
    """

    @staticmethod
    def forward(ctx: Any, loss: Tensor, param: Tensor, grads: list[Tensor]) -> Tensor:
        ctx.grads = grads
        return loss.view_as(loss)

    @staticmethod
    def backward(ctx: Any, weight: Tensor) -> tuple[Tensor, Tensor, None]:
        grads, ctx.grads = ctx.grads, None
        return weight, grads.pop(), None
