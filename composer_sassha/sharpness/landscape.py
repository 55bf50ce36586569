"""The loss along directions around the weights, and between two sets of weights."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from composer_sassha.common.batches import unwrapped
from composer_sassha.common.tensors import copy_into, copy_of, flatten, restored
from composer_sassha.sharpness.objective import Objective
from composer_sassha.sharpness.perturbed_loss import random_vector


def filter_normalized(objective: Objective, seed: int = 0) -> Tensor:
    """Draw a random direction with the norms of the weights' filters (Li et al. 2018, section 4).

    Every filter of a convolution, and every row of a matrix, gets a Gaussian direction with the filter's own
    norm. Biases and the parameters of normalizations, which have one dimension or none, do not move. Weights
    that are rescaled without a change of the function, as BatchNorm allows, have the same landscape.

    Args:
        objective: has the weights.
        seed: determines the direction. Default: 0.

    Example:
        >>> w = torch.nn.Parameter(torch.tensor([[3.0, 4.0], [0.0, 2.0]]))
        >>> d = filter_normalized(Objective({"w": w}, lambda x: w.sum(), [(None, 1)]))
        >>> d.view(2, 2).norm(dim=1)
        tensor([5.0000, 2.0000])
    """
    drawn = objective.like(random_vector(objective, (seed, 1)))
    return flatten(
        [
            None if p.ndim < 2 else _rescaled(d, p.detach())
            for d, p in zip(drawn, objective.params, strict=True)
        ],
        like=objective.params,
    )


def _rescaled(direction: Tensor, weights: Tensor) -> Tensor:
    """Rescale each filter of a direction to the norm of the weights' filter."""
    rest = tuple(range(1, weights.ndim))
    lengths = torch.linalg.vector_norm(direction, dim=rest, keepdim=True)
    return direction.mul(torch.linalg.vector_norm(weights, dim=rest, keepdim=True) / lengths)


def line(objective: Objective, direction: Tensor, at: Sequence[float]) -> NDArray[np.float64]:
    """Return `L(w + a * d)` for every a.

    Args:
        objective: the loss L at the weights w, which are restored.
        direction: d, [size].
        at: the values of a, [n].

    Raises:
        Unfinished: the time is over.

    Example:
        >>> w = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
        >>> objective = Objective({"w": w}, lambda x: (w**2).sum(), [(None, 1)])
        >>> line(objective, torch.tensor([1.0, 0.0]), [-1.0, 0.0, 1.0])
        array([4., 5., 8.])
    """
    (losses,) = plane(objective, direction, torch.zeros_like(direction), at, [0.0])
    return np.asarray(losses)


def plane(
    objective: Objective, first: Tensor, second: Tensor, at: Sequence[float], across: Sequence[float]
) -> NDArray[np.float64]:
    """Return `L(w + a * d + b * f)` for every b (rows) and a (columns).

    Args:
        objective: the loss L at the weights w, which are restored.
        first: d, [size].
        second: f, [size].
        at: the values of a, [n].
        across: the values of b, [m].

    Returns:
        The losses, [m, n].

    Raises:
        Unfinished: the time is over.
    """
    losses = np.empty((len(across), len(at)))
    with restored(objective.params), torch.no_grad():
        weights = copy_of(objective.params)
        for row, b in enumerate(across):
            for column, a in enumerate(at):
                copy_into(objective.params, weights)
                torch._foreach_add_(objective.params, objective.like(a * first + b * second))
                losses[row, column] = objective.loss()
    return losses


def interpolation(
    objective: Objective, model: nn.Module, end: Mapping[str, Tensor], at: Sequence[float]
) -> NDArray[np.float64]:
    """Return the loss at `(1 - a) * now + a * end` for every a, for weights and floating-point buffers alike.

    Args:
        objective: the model's.
        model: its parameters and buffers are restored. Integer buffers are not interpolated.
        end: another state of the same model, from `state_dict`.
        at: the values of a, [n]; 0 is the present model, 1 is `end`.

    Raises:
        KeyError: `end` lacks a part of the model.
        Unfinished: the time is over.
    """
    state = {name: t for name, t in unwrapped(model).state_dict().items() if t.is_floating_point()}
    parts = list(state.values())
    losses = []
    with restored(parts), torch.no_grad():
        begin = copy_of(parts)
        steps = [end[name].to(t) - t for name, t in state.items()]
        for a in at:
            copy_into(parts, begin)
            torch._foreach_add_(parts, [a * step for step in steps])
            losses.append(objective.loss())
    return np.array(losses)
