"""Eigenvalues and trace against the explicit Hessian."""

import numpy as np
import pytest
import torch
from torch import nn

from composer_sassha.common.validate import SettingError
from composer_sassha.curvature import rademacher
from composer_sassha.sharpness import Objective, Unfinished, top_eigenpairs, top_eigenvalues, trace
from tests.curvature.problems import Problem
from tests.sharpness.problems import objective_of_problem, quadratic, symmetric


@pytest.mark.parametrize("sizes", [(8,), (5, 3), (1, 6, 1)])
def test_eigenpairs_are_those_of_the_explicit_hessian(sizes):
    problem = Problem()
    values, vectors = torch.linalg.eigh(problem.hessian())
    pairs = top_eigenpairs(objective_of_problem(problem, sizes), k=5, tol=1e-10)
    assert np.abs(pairs.values - values.flip(0)[:5].numpy()).max() <= 1e-6 * values[-1]
    overlap = np.abs(np.sum(pairs.vectors * vectors.flip(1).T[:5].numpy(), axis=1))
    assert np.abs(overlap - 1).max() <= 1e-6


@pytest.mark.parametrize("tol", [1e-1, 1e-3])
def test_the_error_is_within_the_tolerance(tol):
    problem = Problem()
    exact = torch.linalg.eigvalsh(problem.hessian()).flip(0)[:3].numpy()
    found = top_eigenvalues(objective_of_problem(problem), k=3, tol=tol)
    assert (np.abs(found - exact) <= tol * exact).all()


def test_a_looser_tolerance_takes_fewer_products():
    counts = {}
    for tol in (1e-1, 1e-10):
        ticks = []
        spread = quadratic(symmetric([*range(200)]), tick=lambda t=ticks: t.append(1))
        top_eigenvalues(spread, k=1, tol=tol)
        counts[tol] = len(ticks)
    assert counts[1e-1] < counts[1e-10]


def test_the_largest_are_not_those_of_the_largest_magnitude():
    exact = [-50.0, 7.0, 3.0, 2.0, *np.linspace(-0.5, 0.5, 30)]
    found = top_eigenvalues(quadratic(symmetric(exact)), k=3, tol=1e-9)
    assert found == pytest.approx([7.0, 3.0, 2.0], rel=1e-6)


@pytest.mark.parametrize("size", [1, 2, 20])
def test_a_small_hessian_is_taken_whole(size):
    exact = np.arange(1.0, size + 1)
    assert top_eigenvalues(quadratic(symmetric(exact)), k=5) == pytest.approx(exact[::-1][:5], rel=1e-12)


def test_eigenvalues_that_do_not_converge_are_left_out():
    # A relative accuracy of 1e-3 is not to be had for zeros.
    found = top_eigenvalues(quadratic(symmetric([9.0, 4.0, *[0.0] * 60])), k=4)
    assert found[:2] == pytest.approx([9.0, 4.0], rel=1e-3)
    assert np.abs(found[2:]).max(initial=0) <= 1e-6
    assert len(top_eigenvalues(quadratic(torch.zeros(64, 64)))) == 0


def test_the_trace_is_exact_where_the_hessian_is_diagonal():
    assert trace(quadratic(torch.diag(torch.tensor([1.0, -4.0, 6.0]))), samples=3) == (3.0, 0.0)


def test_the_trace_and_its_error_agree_with_theory():
    problem, samples = Problem(), 400
    hessian = problem.hessian()
    deviation = (2 * (hessian.square().sum() - hessian.diag().square().sum())).sqrt().item()
    mean, error = trace(objective_of_problem(problem), samples=samples)
    # The draws are fixed; by Chebyshev a bound of 4 deviations fails for one seed in 16 at most.
    assert abs(mean - hessian.trace().item()) <= 4 * deviation / samples**0.5
    # That of a sample varies by sqrt((kurtosis - 1) / 4 samples): below 1/16 for a kurtosis of 7 or less.
    assert error == pytest.approx(deviation / samples**0.5, rel=0.25)


def test_the_trace_is_the_mean_over_its_own_probes():
    problem = Problem()
    objective, hessian = objective_of_problem(problem), problem.hessian()
    probes = [
        torch.cat([z.flatten() for z in rademacher(objective.params, (3, sample))]) for sample in range(5)
    ]
    draws = [(z @ hessian @ z).item() for z in probes]
    mean, error = trace(objective, samples=5, seed=3)
    assert mean == pytest.approx(np.mean(draws), rel=1e-10)
    assert error == pytest.approx(np.std(draws, ddof=1) / 5**0.5, rel=1e-10)


def test_frozen_parameters_are_held_fixed():
    problem = Problem()
    problem.model[0].weight.requires_grad_(False)
    full = problem.hessian()[12:, 12:]  # the first 12 are its entries
    found = top_eigenvalues(objective_of_problem(problem), k=1, tol=1e-9)
    assert found[0] == pytest.approx(torch.linalg.eigvalsh(full)[-1].item(), rel=1e-6)


def test_hooks_of_parameters_do_not_run_and_gradients_stay():
    problem = Problem()
    exact = torch.linalg.eigvalsh(problem.hessian())[-1].item()
    for p in problem.params:
        p.register_hook(lambda grad: 2 * grad)
        p.grad = torch.full_like(p, 3.0)
    assert top_eigenvalues(objective_of_problem(problem), k=1, tol=1e-9)[0] == pytest.approx(exact, rel=1e-6)
    assert all((p.grad == 3).all() for p in problem.params)


def test_what_is_not_finite_is_unfinished():
    matrix = torch.full((2, 2), torch.nan)
    objective = quadratic(matrix)
    for measured in (objective.gradient, lambda: top_eigenvalues(objective), lambda: trace(objective)):
        with pytest.raises(Unfinished):
            measured()


def test_a_model_without_second_derivative_is_refused_in_one_line():
    model = nn.Linear(2, 1)

    class Half(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x**2

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx, grad):
            return 2 * grad * ctx.saved_tensors[0]

    objective = Objective(
        dict(model.named_parameters()), lambda x: Half.apply(model(x)).mean(), [(torch.ones(1, 2), 1)]
    )
    with pytest.raises(SettingError, match=r"sharpness: .*Half has none") as caught:
        top_eigenvalues(objective)
    assert "LazyHessian" not in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"k": 0}, "eigenvalues=0"), ({"k": 1.5}, "eigenvalues=1.5"), ({"tol": 0}, "tol=0")],
)
def test_arguments_that_are_not_allowed(settings, message):
    with pytest.raises((TypeError, ValueError), match=message):
        top_eigenvalues(quadratic(torch.eye(2)), **settings)
    with pytest.raises(ValueError, match="trace_samples=1"):
        trace(quadratic(torch.eye(2)), samples=1)


@pytest.mark.parametrize(
    ("params", "batches", "message"),
    [
        ({"w": torch.zeros(1)}, [(None, 1)], "unfreeze"),
        ({"w": nn.Parameter(torch.zeros(1, dtype=torch.bfloat16))}, [(None, 1)], "torch.bfloat16"),
        ({"w": nn.Parameter(torch.zeros(1, dtype=torch.float16))}, [(None, 1)], "torch.float16"),
        ({"w": nn.Parameter(torch.zeros(1))}, [], "no batch"),
    ],
)
def test_objectives_that_cannot_be_measured_are_refused(params, batches, message):
    with pytest.raises(SettingError, match=message):
        Objective(params, lambda _: params["w"].sum(), batches)
