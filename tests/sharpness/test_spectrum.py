"""Stochastic Lanczos quadrature against the explicit spectrum."""

import numpy as np
import pytest
import torch

from composer_sassha.curvature import rademacher
from composer_sassha.sharpness import Spectrum, Unfinished, spectrum
from composer_sassha.sharpness.spectral_density import quadrature
from tests.curvature.problems import Problem
from tests.sharpness.problems import objective_of_problem, quadratic, symmetric

STEPS = 6


def probes(objective, count, seed=0):
    drawn = [rademacher(objective.params, (seed, probe)) for probe in range(count)]
    return [torch.cat([z.flatten() for z in probe]) / objective.size**0.5 for probe in drawn]


def test_polynomials_are_integrated_exactly():
    problem = Problem()
    objective, hessian = objective_of_problem(problem), problem.hessian()
    found = spectrum(objective, STEPS, probes=3, seed=4)
    assert len(found.eigenvalues) == len(found.weights) == 3 * STEPS
    for power in range(2 * STEPS):
        exact = np.mean(
            [(v @ torch.linalg.matrix_power(hessian, power) @ v).item() for v in probes(objective, 3, 4)]
        )
        assert found.eigenvalues**power @ found.weights == pytest.approx(exact, rel=1e-9, abs=1e-12)
    # It is a Gauss rule: one degree more is not exact.
    degree = 2 * STEPS
    exact = np.mean(
        [(v @ torch.linalg.matrix_power(hessian, degree) @ v).item() for v in probes(objective, 3, 4)]
    )
    assert found.eigenvalues**degree @ found.weights != pytest.approx(exact, rel=1e-9)


def smoothed(matrix, at, width):
    """The matrix f(H) for every point, f the Gaussian around it."""
    values, vectors = torch.linalg.eigh(matrix)
    distance = (values.numpy()[None] - at[:, None]) / width
    gauss = np.exp(-(distance**2) / 2) / (width * (2 * np.pi) ** 0.5)
    return np.einsum("ik,nk,jk->nij", vectors.numpy(), gauss, vectors.numpy())


def gauss_error(steps, low, high, at, width):
    """A bound of the quadrature's error for the Gaussian around each point.

    The rule is exact up to degree 2 steps - 1, and positive: the error is at most twice that of the best
    polynomial of this degree, which for a function bounded by M in the Bernstein ellipse with parameter r is
    at most 2 M r^-(2 steps - 1) / (r - 1) (Trefethen 2013, theorem 8.2). On the ellipse around [low, high]
    the Gaussian is at most exp(b^2 / 2 width^2) times its peak, b its short half-axis.
    """
    half = (high - low) / 2
    best = np.inf
    for r in np.linspace(1.01, 6, 500):
        b = half * (r - 1 / r) / 2
        peak = np.exp(b**2 / (2 * width**2)) / (width * (2 * np.pi) ** 0.5)
        best = min(best, 4 * peak * r ** -(2 * steps - 1) / (r - 1))
    return best + 0 * at


def test_the_density_is_within_the_bound_of_the_quadrature():
    problem = Problem()
    objective, hessian = objective_of_problem(problem), problem.hessian()
    values = torch.linalg.eigvalsh(hessian)
    low, high = values[0].item(), values[-1].item()
    width, at = (high - low) / 6, np.linspace(low, high, 40)
    for steps in (8, 12, 16):
        found = spectrum(objective, steps, probes=2).density(at, width)
        exact = np.mean(
            [
                np.einsum("i,nij,j->n", v.numpy(), smoothed(hessian, at, width), v.numpy())
                for v in probes(objective, 2)
            ],
            axis=0,
        )
        bound = gauss_error(steps, low, high, at, width)
        assert (np.abs(found - exact) <= bound).all()
    assert bound.max() <= 1e-3 * exact.max(), "the bound says something"


def test_the_density_is_within_the_deviation_of_its_probes():
    problem, count = Problem(), 40
    objective, hessian = objective_of_problem(problem, [8]), problem.hessian()
    size = len(hessian)
    values = torch.linalg.eigvalsh(hessian).numpy()
    width, at = (values[-1] - values[0]) / 12, np.linspace(values[0], values[-1], 25)
    found = spectrum(objective, size, probes=count).density(at, width)  # as many steps as there are: exact
    matrices = smoothed(hessian, at, width)
    exact = np.trace(matrices, axis1=1, axis2=2) / size
    off = matrices - matrices * np.eye(size)
    deviation = (2 * (off**2).sum(axis=(1, 2)) / count) ** 0.5 / size
    # Of 25 points that move together; by Chebyshev each is farther off with a probability of 1/25.
    assert (np.abs(found - exact) <= 5 * deviation).all()


def test_the_density_is_one_in_all_and_that_of_the_true_eigenvalues():
    exact = [-1.0, 0.0, 0.0, 0.5, 4.0]
    found = spectrum(quadratic(torch.diag(torch.tensor(exact))), probes=1)
    # Rademacher vectors have the same share of every eigenvector where the Hessian is diagonal.
    assert found.eigenvalues == pytest.approx([-1.0, 0.0, 0.5, 4.0], abs=1e-6)
    assert found.weights == pytest.approx([0.2, 0.4, 0.2, 0.2], abs=1e-6)
    at = np.linspace(-5, 8, 4000)
    assert np.trapezoid(found.density(at, 0.1), at) == pytest.approx(1, abs=1e-9)


def test_lanczos_stops_where_the_matrix_leads_nowhere():
    matrix = symmetric([3.0, 2.0, *[0.0] * 38])
    start = torch.randn(40, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    values, weights = quadrature(lambda v: matrix @ v, start, 30)
    assert len(values) <= 4 and weights.sum() == pytest.approx(1)
    assert values.max() == pytest.approx(3)
    values, weights = quadrature(lambda v: 0 * v, start, 30)
    assert (values, weights) == ([0], [1])


def test_no_eigenvalue_appears_twice():
    # Without keeping all vectors orthogonal, copies of the large ones appear long before 60 steps.
    exact = [100.0, 50.0, *np.linspace(0, 1, 78)]
    objective = quadratic(symmetric(exact).float())
    found = spectrum(objective, steps=60, probes=1)
    assert (found.eigenvalues > 40).sum() == 2


def test_what_is_not_finite_is_unfinished_and_arguments_are_checked():
    with pytest.raises(Unfinished):
        spectrum(quadratic(torch.full((2, 2), torch.inf)))
    with pytest.raises(ValueError, match="steps=0"):
        spectrum(quadratic(torch.eye(2)), steps=0)
    with pytest.raises(ValueError, match="probes=0"):
        spectrum(quadratic(torch.eye(2)), probes=0)
    with pytest.raises(ValueError, match="width=0"):
        Spectrum(np.zeros(1), np.ones(1)).density(np.zeros(1), 0)
