"""Walks over autograd graphs."""

from collections.abc import Iterable

from torch import Tensor
from torch.autograd.graph import GradientEdge, Node


def nodes(output: Tensor | GradientEdge) -> list[Node]:
    """Return all nodes of a tensor's autograd graph, each once, in an order that the graph determines.

    Example:
        >>> import torch
        >>> x = torch.ones(2, requires_grad=True)
        >>> sorted(node.name() for node in nodes(x.exp().sum()))
        ['ExpBackward0', 'SumBackward0', 'torch::autograd::AccumulateGrad']
    """
    seen: dict[Node, None] = {}
    ahead = [output.node if isinstance(output, GradientEdge) else output.grad_fn]
    while ahead:
        node = ahead.pop()
        if node is not None and node not in seen:
            seen[node] = None
            ahead.extend(following for following, _ in node.next_functions)
    return list(seen)


def leaves(output: Tensor | GradientEdge, besides: Iterable[Tensor] = ()) -> list[Tensor]:
    """Return the leaves that a backward of a tensor reaches, without those in `besides`.

    Example:
        >>> import torch
        >>> w, x = torch.ones(1, requires_grad=True), torch.ones(2, requires_grad=True)
        >>> leaves((w * x).sum(), besides=[w])
        [tensor([1., 1.], requires_grad=True)]
    """
    known = set(besides)
    accumulating = [node for node in nodes(output) if node.name() == "torch::autograd::AccumulateGrad"]
    found = (node.variable for node in accumulating)  # type: ignore[attr-defined]  # only this kind has one
    return [leaf for leaf in found if leaf not in known]
