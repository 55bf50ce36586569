"""The Hessian's spectral density, by stochastic Lanczos quadrature."""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from composer_sassha.common import validate
from composer_sassha.common.tensors import flatten
from composer_sassha.curvature.probes import rademacher
from composer_sassha.sharpness.hessian import Product, led
from composer_sassha.sharpness.objective import Objective


@dataclass(frozen=True)
class Spectrum:
    """A quadrature of the Hessian's spectral density: points, and the share of the eigenvalues at each.

    Args:
        eigenvalues: the points, of all probes together, [points].
        weights: their shares, which add up to 1, [points].
    """

    eigenvalues: NDArray[np.float64]
    weights: NDArray[np.float64]

    def density(self, at: NDArray[np.float64], width: float) -> NDArray[np.float64]:
        """Return the density, every point smoothed to a Gaussian (Ghorbani et al. 2019, section 2).

        Args:
            at: where, [n].
            width: standard deviation of the Gaussians, > 0.

        Example:
            >>> Spectrum(np.array([0.0, 2.0]), np.array([0.75, 0.25])).density(np.array([0.0]), 0.1).round(3)
            array([2.992])
        """
        validate.number("sharpness", "width", width, low=np.finfo(float).tiny)
        distance = (np.asarray(at)[:, None] - self.eigenvalues) / width
        root: float = (2 * np.pi) ** 0.5
        density: NDArray[np.float64] = np.exp(-(distance**2) / 2) @ self.weights / (width * root)
        return density


def spectrum(objective: Objective, steps: int = 80, probes: int = 4, seed: int = 0) -> Spectrum:
    """Estimate the density of the Hessian's eigenvalues (Ghorbani et al. 2019, arXiv 1901.10159).

    For each probe v, a Rademacher vector of length 1, Lanczos gives a tridiagonal matrix; its eigenvalues,
    with the squared first entries of its eigenvectors as shares, are the Gauss quadrature of v's density:
    every polynomial of degree 2 * steps - 1 or less is integrated exactly. The mean over probes estimates
    the whole density; a single large eigenvalue has a share of about 1 / size.

    Args:
        objective: of which the Hessian is taken.
        steps: of Lanczos for each probe, >= 1; the cost is one product each, and so many vectors in memory,
            as all of them are kept orthogonal. Default: 80.
        probes: how many, >= 1. Default: 4.
        seed: of the probes. Default: 0.

    Raises:
        SettingError: an operation of the model has no second derivative.
        Unfinished: a product is not finite, or the time is over.
        TypeError, ValueError: an argument that is not allowed.

    Example:
        >>> w = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
        >>> objective = Objective({"w": w}, lambda x: (x * w**2).sum() / 2, [(torch.tensor([1.0, 5.0]), 1)])
        >>> found = spectrum(objective, probes=1)
        >>> found.eigenvalues.round(5), found.weights.round(5)
        (array([1., 5.]), array([0.5, 0.5]))
    """
    validate.integer("sharpness", "steps", steps, low=1)
    validate.integer("sharpness", "probes", probes, low=1)

    def solve(product: Product) -> Spectrum:
        found = []
        for probe in range(probes):
            start = flatten(rademacher(objective.params, (seed, probe)), like=objective.params)
            found.append(quadrature(product, start, steps))
        points, shares = (np.concatenate(parts) for parts in zip(*found, strict=True))
        return Spectrum(points, shares / probes)

    return led(objective, solve)


def quadrature(
    product: Product, start: Tensor, steps: int
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Run Lanczos from a vector; return the points of its quadrature and their shares, each [steps or fewer].

    Args:
        product: a symmetric matrix times a vector.
        start: the vector; its length does not matter.
        steps: at most so many; fewer where the matrix leaves what the vectors so far span unchanged.
    """
    from scipy.linalg import eigh_tridiagonal

    steps = min(steps, len(start))
    basis = start.new_empty(steps, len(start))
    diagonal: list[float] = []
    beside: list[float] = []
    vector = start / torch.linalg.vector_norm(start)
    for step in range(steps):
        basis[step] = vector
        image = product(vector)
        diagonal.append(torch.dot(image, vector).item())
        # Against all vectors before, and twice: rounding would let copies of found eigenvalues appear.
        so_far = basis[: step + 1]
        for _ in range(2):
            image = image - so_far.T @ (so_far @ image)
        length = torch.linalg.vector_norm(image).item()
        size = max(map(abs, [*diagonal, *beside]))
        if length <= torch.finfo(image.dtype).eps * size or step == steps - 1:
            break
        beside.append(length)
        vector = image / length
    values, vectors = eigh_tridiagonal(np.array(diagonal), np.array(beside))
    return values, vectors[0] ** 2
