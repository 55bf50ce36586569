"""Small objectives in float64, and their derivatives written out."""

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from composer_sassha.sharpness import Objective
from tests.curvature.problems import Problem


def objective_of_problem(problem: Problem, sizes: Sequence[int] = (5, 3), **settings: Any) -> Objective:
    """The problem's samples in batches of these sizes, of which the mean loss is that of all."""
    starts = np.cumsum([0, *sizes])
    batches = [((problem.x[a:b], problem.y[a:b]), int(b - a)) for a, b in pairwise(starts)]
    return Objective(
        dict(problem.model.named_parameters()),
        lambda batch: nn.functional.cross_entropy(problem.model(batch[0]), batch[1]),
        batches,
        **settings,
    )


def quadratic(matrix: Tensor, at: Tensor | None = None, name: str = "w", **settings: Any) -> Objective:
    """Half of w^T A w."""
    w = nn.Parameter(torch.zeros(len(matrix)).to(matrix) if at is None else at.clone())
    return Objective({name: w}, lambda _: w @ matrix @ w / 2, [(None, 1)], **settings)


def symmetric(eigenvalues: Sequence[float], seed: int = 0) -> Tensor:
    """A matrix with these eigenvalues and random eigenvectors."""
    generator = torch.Generator().manual_seed(seed)
    size = len(eigenvalues)
    basis, _ = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))
    return basis @ torch.diag(torch.tensor(eigenvalues, dtype=torch.float64)) @ basis.T


def in_the_plane(loss: Callable[[Tensor], Tensor], w: Tensor, shape: Callable[[Tensor], Tensor]) -> float:
    """The highest rise over what `shape` makes of a fine grid of the unit disc; w has two entries."""
    angle = torch.linspace(0, 2 * torch.pi, 721, dtype=torch.float64)
    radius = torch.linspace(0, 1, 201, dtype=torch.float64)
    disc = torch.stack(
        [torch.outer(radius, angle.cos()).flatten(), torch.outer(radius, angle.sin()).flatten()], dim=1
    )
    return (loss(w + shape(disc)) - loss(w[None])).max().item()
