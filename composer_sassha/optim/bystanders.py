"""The leaves that get a gradient in a step and are not the optimizer's."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from composer_sassha.common.replaced import replaced
from composer_sassha.curvature.graph import leaves


@contextlib.contextmanager
def bystanders_spared(params: Sequence[Tensor]) -> Iterator[None]:
    """Run an ascent, and restore the `grad` of all leaves of its losses other than `params`.

    Another optimizer's parameters, an input or a prompt then end the step with the gradient from before it
    and what the descent adds: that of one pass, as in plain training.
    """
    before: dict[Tensor, Tensor | None] = {}
    within = False  # a reentrant activation checkpoint calls backward within a backward, on leaves of its own

    def noting(backward: Callable[..., None]) -> Callable[..., None]:
        def wrapped(tensors: Any, *args: Any, **kwargs: Any) -> None:
            nonlocal within
            if within:
                return backward(tensors, *args, **kwargs)
            tensors = (tensors,) if isinstance(tensors, (Tensor, GradientEdge)) else tuple(tensors)
            for loss in tensors:
                for leaf in leaves(loss, besides=[*params, *before]):
                    before[leaf], leaf.grad = leaf.grad, None
            within = True
            try:
                return backward(tensors, *args, **kwargs)
            finally:
                within = False

        return wrapped

    # Only the loss knows its leaves, and every loop hands it to this function: the Trainer's, a scaler's, the
    # user's.
    try:
        with replaced([(torch.autograd, "backward", noting)]):
            yield
    finally:
        for leaf, grad in before.items():
            leaf.grad = grad
