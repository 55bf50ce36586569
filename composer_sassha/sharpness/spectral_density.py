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
    """A quadrature of the Hessian's spectral density: points, and the fraction of eigenvalues at each.

    Args:
        eigenvalues: the points of all probes, [points].
        weights: the fractions, which add up to 1, [points].
    """

    eigenvalues: NDArray[np.float64]
    weights: NDArray[np.float64]

    def density(self, at: NDArray[np.float64], width: float) -> NDArray[np.float64]:
        """Return the density, with every point smoothed to a Gaussian (Ghorbani et al. 2019, section 2).

        Args:
            at: the positions, [n].
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

    For each probe v, a Rademacher vector of length 1, Lanczos gives a tridiagonal matrix. Its eigenvalues,
    weighted by the squared first entries of its eigenvectors, are the Gauss quadrature of v's density: they
    integrate every polynomial of degree 2 * steps - 1 or less exactly. The mean over probes estimates the
    whole density; a single large eigenvalue has a weight of about 1 / size.

    Args:
        objective: has the Hessian.
        steps: Lanczos steps for each probe, >= 1; each costs one product and one vector in memory, since all
            vectors are kept orthogonal. Default: 80.
        probes: the number of probes, >= 1. Default: 4.
        seed: determines the probes. Default: 0.

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
        points, weights = (np.concatenate(parts) for parts in zip(*found, strict=True))
        return Spectrum(points, weights / probes)

    return led(objective, solve)


def quadrature(
    product: Product, start: Tensor, steps: int
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Run Lanczos from a vector; return the points and weights of its quadrature, each [steps or fewer].

    Args:
        product: a symmetric matrix times a vector.
        start: the vector, of any length.
        steps: the largest number of steps; Lanczos stops earlier once its vectors span an invariant subspace.
    """
    from scipy.linalg import eigh_tridiagonal

    steps = min(steps, len(start))
    basis = start.new_empty(steps, len(start))
    diagonal: list[float] = []
    off_diagonal: list[float] = []
    vector = start / torch.linalg.vector_norm(start)
    for step in range(steps):
        basis[step] = vector
        image = product(vector)
        diagonal.append(torch.dot(image, vector).item())
        # Orthogonalize against all vectors so far, and twice: else rounding brings copies of eigenvalues.
        so_far = basis[: step + 1]
        for _ in range(2):
            image = image - so_far.T @ (so_far @ image)
        length = torch.linalg.vector_norm(image).item()
        size = max(map(abs, [*diagonal, *off_diagonal]))
        if length <= torch.finfo(image.dtype).eps * size or step == steps - 1:
            break
        off_diagonal.append(length)
        vector = image / length
    values, vectors = eigh_tridiagonal(np.array(diagonal), np.array(off_diagonal))
    return values, vectors[0] ** 2
