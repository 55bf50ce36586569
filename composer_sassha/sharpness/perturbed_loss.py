"""The rise of the loss around the weights: in the worst direction, for groups of samples, on average."""

import math
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from composer_sassha.common import validate
from composer_sassha.common.rng import generator
from composer_sassha.common.tensors import copy_into, copy_of, global_norm, restored
from composer_sassha.perturbations import (
    ASAMPerturbation,
    Gradient,
    Perturbation,
    Point,
    SAMPerturbation,
)
from composer_sassha.perturbations.base import displacement
from composer_sassha.sharpness.hessian import Estimate, estimate
from composer_sassha.sharpness.objective import Objective, Unfinished


def rise(objective: Objective, perturbation: Perturbation) -> float:
    """Return `L(w + e) - L(w)`, e the displacement of a perturbation with one ascent, such as SAM's.

    For SAM this is GSAM's surrogate gap h (Zhuang et al. 2022, section 3): at a minimum, `2 h / rho^2` lies
    between the smallest and the largest eigenvalue of the Hessian, up to terms of third order.

    Args:
        objective: the loss L at the weights w, which are restored.
        perturbation: displaces the weights along the gradient.

    Raises:
        Unfinished: the gradient is not finite, or the time is over.

    Example:
        >>> w = torch.nn.Parameter(torch.tensor([1.0, 0.0]))
        >>> objective = Objective({"w": w}, lambda x: (x * w).sum(), [(torch.tensor([3.0, 4.0]), 1)])
        >>> round(rise(objective, SAMPerturbation(rho=0.5)), 6)
        2.5
    """
    before, grads = objective.loss(), objective.like(objective.gradient())
    with restored(objective.params), torch.no_grad():
        _displace(objective, perturbation, grads)
        return objective.loss() - before


def _displace(objective: Objective, perturbation: Perturbation, grads: Sequence[Tensor]) -> None:
    names = dict(zip(objective.params, objective.names, strict=True))
    at = Point(objective.params, name_of=names.get)
    e = displacement(perturbation, at, Gradient(objective.params, grads))
    if e is not None:
        e.apply()


def sam_sharpness(objective: Objective, rho: float = 0.05, steps: int = 1) -> float:
    """Return SAM's sharpness, the largest `L(w + e) - L(w)` with `||e|| <= rho` (Foret et al. 2021, eq. 1).

    The maximum itself is unknown. The result is a lower bound: the highest loss along an ascent that starts
    with SAM's own `e = rho * g / ||g||` (equation 2). Every further step adds
    `rho * g(w + e) / ||g(w + e)||` to e, and projects the sum onto the ball of radius rho.

    Args:
        objective: the loss L at the weights w, which are restored.
        rho: radius of the neighbourhood, > 0. Default: 0.05.
        steps: ascent steps, >= 1; each takes a gradient and a loss. Default: 1.

    Raises:
        Unfinished: a gradient is not finite, or the time is over.
        TypeError, ValueError: an argument that is not allowed.

    Example:
        >>> w = torch.nn.Parameter(torch.tensor([1.0, 0.1]))
        >>> objective = Objective({"w": w}, lambda x: (x * w**2).sum() / 2, [(torch.tensor([1.0, 8.0]), 1)])
        >>> round(sam_sharpness(objective, 1.0), 3), round(sam_sharpness(objective, 1.0, steps=20), 3)
        (3.146, 4.864)
    """
    positive("rho", rho)
    validate.integer("sharpness", "ascent_steps", steps, low=1)
    perturbation, params = SAMPerturbation(rho), objective.params
    with restored(params), torch.no_grad():
        weights = copy_of(params)
        before, highest = objective.loss(), -math.inf
        for _ in range(steps):
            _displace(objective, perturbation, objective.like(objective.gradient()))
            _project(params, weights, rho)
            highest = max(highest, objective.loss() - before)
    return highest


def _project(params: Sequence[Tensor], centre: Sequence[Tensor], rho: float) -> None:
    """Project the weights onto the ball of radius rho around the centre if they lie outside of it."""
    away = list(torch._foreach_sub(list(params), list(centre)))
    length = global_norm(away).item()
    # The tolerance leaves a first step alone, which is longer than rho by rounding only: it is SAM's own e.
    if length > rho * (1 + 1e-6):
        copy_into(params, centre)
        torch._foreach_add_(list(params), away, alpha=rho / length)


def asam_sharpness(objective: Objective, rho: float = 0.5, eta: float = 0.01) -> float:
    """Return adaptive sharpness: the largest `L(w + e) - L(w)` with `||e / T|| <= rho` (Kwon et al. 2021).

    T is as in `ASAMPerturbation`. As in `sam_sharpness` the result is a lower bound of the maximum, from the
    one step of ASAM's own ascent.

    Args:
        objective: the loss L at the weights w, which are restored.
        rho: radius of the neighbourhood, > 0. Default: 0.5.
        eta: added to `|w|`, so that weights near zero are displaced too, >= 0. Default: 0.01.

    Raises:
        Unfinished: the gradient is not finite, or the time is over.
        TypeError, ValueError: an argument that is not allowed.

    Example:
        >>> w = torch.nn.Parameter(torch.tensor([3.0, -1.0]))
        >>> objective = Objective({"weight": w}, lambda x: (x * w).sum(), [(torch.tensor([1.0, 4.0]), 1)])
        >>> round(asam_sharpness(objective, rho=0.5, eta=0.0), 6)  # rho * ||T g||
        2.5
    """
    positive("asam_rho", rho)
    return rise(objective, ASAMPerturbation(rho, eta))


def m_sharpness(objective: Objective, m: int, rho: float = 0.05, steps: int = 1) -> float:
    """Return m-sharpness: the mean of SAM's sharpness over disjoint groups of m samples each.

    (Foret et al. 2021, section 4.1.) Every group has its own loss and its own ascent. Each ascent gives a
    lower bound of its group's maximum (see `sam_sharpness`), hence the mean is a lower bound too. Groups are
    taken in the order of the samples; the last, smaller group is dropped. Each rank forms its own groups.

    Args:
        objective: has the samples, and the weights, which are restored.
        m: samples in a group, >= 1.
        rho: radius of the neighbourhood, > 0. Default: 0.05.
        steps: ascent steps, >= 1. Default: 1.

    Raises:
        Unfinished: there are fewer than m samples on every rank, a gradient is not finite, or the time is
            over.
        TypeError, ValueError: an argument that is not allowed.

    Example:
        >>> w = torch.nn.Parameter(torch.zeros(1))
        >>> batch = torch.tensor([[1.0], [-1.0], [3.0], [1.0]])
        >>> objective = Objective({"w": w}, lambda x: (x @ w).mean(), [(batch, 4)])
        >>> [round(m_sharpness(objective, m, rho=0.1), 6) for m in (1, 2, 4)]
        [0.15, 0.1, 0.1]
    """
    validate.integer("sharpness", "m", m, low=1)
    groups = objective.groups(m)
    device = objective.params[0].device
    most = torch.tensor([len(groups)], device=device)
    objective.ranks.reduce_(most, dist.ReduceOp.MAX)
    found = torch.zeros(2, dtype=torch.float64, device=device)
    for i in range(int(most)):  # every tick is a collective: the same number on every rank
        objective.tick()
        if i < len(groups):
            found += found.new_tensor([_or_nan(groups[i], rho, steps), 1.0])
    objective.ranks.reduce_(found)
    sums: list[float] = found.tolist()
    total, count = sums
    if not count or not math.isfinite(total):
        raise Unfinished(f"no groups of {m} samples, or a gradient that is not finite")
    return total / count


def _or_nan(group: Objective, rho: float, steps: int) -> float:
    """Return a group's sharpness, or NaN if it is unfinished.

    A group belongs to one rank. If that rank raised, the others would wait for it in the sum over ranks.
    """
    try:
        return sam_sharpness(group, rho, steps)
    except Unfinished:
        return math.nan


def average_sharpness(
    objective: Objective, rho: float = 0.05, directions: int = 10, seed: int = 0
) -> Estimate:
    """Return the mean of `L(w + rho * z / ||z||) - L(w)` over random directions, z Gaussian.

    (As SASSHA's paper measures it: Shin et al. 2025, arXiv 2502.18153.) To second order it is
    `rho^2 / 2 * trace(H) / size`. Every direction is averaged with its opposite. That leaves the mean
    unchanged and cancels the gradient's contribution, the larger part of the variance.

    Args:
        objective: the loss L at the weights w, which are restored.
        rho: length of the displacement, > 0. Default: 0.05.
        directions: the number of directions, >= 2; two losses each. Default: 10.
        seed: determines the directions. Default: 0.

    Raises:
        Unfinished: the time is over.
        TypeError, ValueError: an argument that is not allowed.

    Example:
        >>> w = torch.nn.Parameter(torch.zeros(2))
        >>> objective = Objective({"w": w}, lambda x: (w**2).sum(), [(None, 1)])
        >>> round(average_sharpness(objective, rho=0.5, directions=3).mean, 6)
        0.25
    """
    positive("rho", rho)
    validate.integer("sharpness", "directions", directions, low=2)
    before, found = objective.loss(), []
    for direction in range(directions):
        z = random_vector(objective, (seed, direction))
        e = objective.like(z * (rho / torch.linalg.vector_norm(z)))
        with restored(objective.params), torch.no_grad():
            weights, rises = copy_of(objective.params), []
            for sign in (1, -1):
                copy_into(objective.params, weights)
                torch._foreach_add_(objective.params, e, alpha=sign)
                rises.append(objective.loss() - before)
        found.append(sum(rises) / 2)
    return estimate(found)


def random_vector(objective: Objective, key: Sequence[int]) -> Tensor:
    """Draw a Gaussian vector over the parameters, [size]; a key of integers determines it."""
    first = objective.params[0]
    draws = torch.randn(objective.size, generator=generator(key, torch.device("cpu")), dtype=torch.float64)
    return draws.to(first.device, torch.promote_types(first.dtype, torch.float32))


def positive(name: str, value: float) -> None:
    """Raise TypeError or ValueError unless an argument is a finite number > 0."""
    validate.number("sharpness", name, value, low=0)
    if value == 0:
        raise ValueError(f"sharpness: {name}=0 is not allowed; it must be a number > 0")
