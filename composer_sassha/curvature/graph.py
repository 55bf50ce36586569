"""Walks over autograd graphs."""

from torch import Tensor
from torch.autograd.graph import Node


def nodes(output: Tensor) -> set[Node]:
    """Return all nodes of a tensor's autograd graph.

    Example:
        >>> import torch
        >>> x = torch.ones(2, requires_grad=True)
        >>> sorted(node.name() for node in nodes(x.exp().sum()))
        ['ExpBackward0', 'SumBackward0', 'torch::autograd::AccumulateGrad']
    """
    seen: set[Node] = set()
    ahead = [output.grad_fn]
    while ahead:
        node = ahead.pop()
        if node is not None and node not in seen:
            seen.add(node)
            ahead.extend(following for following, _ in node.next_functions)
    return seen
