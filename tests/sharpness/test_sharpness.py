"""Rises of the loss against the same arithmetic written out, and against the maximum on a fine grid."""

import numpy as np
import pytest
import torch
from torch import nn

from composer_sassha.perturbations import ASAMPerturbation, SAMPerturbation
from composer_sassha.sharpness import (
    Objective,
    Unfinished,
    asam_sharpness,
    average_sharpness,
    m_sharpness,
    rise,
    sam_sharpness,
)
from tests.curvature.problems import Problem
from tests.helpers import assert_same, copied
from tests.sharpness.problems import in_the_plane, objective_of_problem, quadratic, symmetric


def weights_and_loss(problem, part=slice(None)):
    """The weights as one vector, and the loss of some samples as its function, without our code."""
    names = {name: p.detach().clone() for name, p in problem.model.named_parameters()}
    sizes = [p.numel() for p in names.values()]

    def loss(w):
        pieces = w.split(sizes)
        given = {name: piece.view(p.shape) for (name, p), piece in zip(names.items(), pieces, strict=True)}
        outputs = torch.func.functional_call(problem.model, given, (problem.x[part],))
        return nn.functional.cross_entropy(outputs, problem.y[part])

    return torch.cat([p.flatten() for p in names.values()]), loss, names


def brute_sam(problem, rho, part=slice(None)):
    w, loss, _ = weights_and_loss(problem, part)
    g = torch.func.grad(loss)(w)
    return (loss(w + rho * g / g.norm()) - loss(w)).item()


def test_sam_and_the_surrogate_gap_are_the_papers():
    problem = Problem()
    for rho in (0.01, 0.3):
        exact = brute_sam(problem, rho)
        objective = objective_of_problem(problem)
        assert sam_sharpness(objective, rho) == pytest.approx(exact, rel=1e-11)
        assert rise(objective, SAMPerturbation(rho)) == pytest.approx(exact, rel=1e-11)


def test_asam_is_the_papers():
    problem, rho, eta = Problem(), 0.4, 0.02
    w, loss, names = weights_and_loss(problem)
    scale = torch.cat(
        [(p.abs() + eta if "weight" in name else torch.ones_like(p)).flatten() for name, p in names.items()]
    )
    g = torch.func.grad(loss)(w)
    e = rho * scale**2 * g / (scale * g).norm()
    exact = (loss(w + e) - loss(w)).item()
    assert asam_sharpness(objective_of_problem(problem), rho, eta) == pytest.approx(exact, rel=1e-11)


@pytest.mark.parametrize("sizes", [(8,), (5, 3), (1, 1, 6)])
@pytest.mark.parametrize("m", [1, 2, 3, 8])
def test_m_sharpness_is_the_mean_over_disjoint_groups(m, sizes):
    problem, rho = Problem(), 0.2
    exact = np.mean([brute_sam(problem, rho, slice(a, a + m)) for a in range(0, 8 - m + 1, m)])
    assert m_sharpness(objective_of_problem(problem, sizes), m, rho) == pytest.approx(exact, rel=1e-10)


def test_more_samples_than_there_are_make_no_group():
    with pytest.raises(Unfinished, match="9 samples"):
        m_sharpness(objective_of_problem(Problem()), m=9)


def rugged(w):
    """A smooth function of two weights that is no quadratic; w has shape [n, 2]."""
    x, y = w[..., 0], w[..., 1]
    return 0.5 * x**2 + 2 * y**2 + 0.3 * torch.sin(3 * x + y) + 0.1 * x * y**2


def test_one_step_is_below_the_maximum_and_more_steps_reach_it():
    w, rho = torch.tensor([0.4, -0.1], dtype=torch.float64), 0.5
    param = nn.Parameter(w.clone())
    objective = Objective({"w": param}, lambda _: rugged(param), [(None, 1)])
    highest = in_the_plane(rugged, w, lambda disc: rho * disc)
    one, many = sam_sharpness(objective, rho), sam_sharpness(objective, rho, steps=200)
    missed = 8 / 2 * (rho * np.pi / 720) ** 2  # the circle's points are so far apart, curvatures below 8
    assert one <= many <= highest + missed
    assert many == pytest.approx(highest, abs=missed) and one < highest - 10 * missed


def test_asam_is_below_the_maximum_of_its_neighbourhood_and_near_it_for_a_small_one():
    w, eta = torch.tensor([0.4, -0.1], dtype=torch.float64), 0.01
    param = nn.Parameter(w.clone())
    objective = Objective({"weight": param}, lambda _: rugged(param), [(None, 1)])
    scale = w.abs() + eta
    for rho in (0.05, 1.0):
        highest = in_the_plane(rugged, w, lambda disc, rho=rho: rho * disc * scale)
        found = asam_sharpness(objective, rho, eta)
        assert found <= highest + 8 / 2 * (rho * np.pi / 720) ** 2
    # Equal to first order; to second each is off by half the curvature, below 8, times the length squared.
    small = 0.01
    highest = in_the_plane(rugged, w, lambda disc: small * disc * scale)
    assert asam_sharpness(objective, small, eta) == pytest.approx(highest, abs=8 * (0.41 * small) ** 2)


def test_the_gap_of_a_quadratic_lies_between_its_eigenvalues():
    exact = [0.5, 1.0, 2.0, 5.0]
    for seed in range(3):
        matrix = symmetric(exact, seed)
        at = 1e-9 * torch.ones(4, dtype=torch.float64)  # at the minimum itself there is no ascent
        gap = rise(quadratic(matrix, at), SAMPerturbation(0.1))
        assert 0.5 - 1e-6 <= 2 * gap / 0.1**2 <= 5 + 1e-6
        reached = sam_sharpness(quadratic(matrix, at), 0.1, steps=200)
        assert 2 * reached / 0.1**2 == pytest.approx(5, rel=1e-4)  # the ascent is a power iteration


def test_average_sharpness_is_that_of_its_directions_and_near_the_trace():
    exact = [0.0, 1.0, 3.0, 10.0, 2.0]
    matrix, rho, count = symmetric(exact), 0.3, 200
    found = average_sharpness(quadratic(matrix), rho, count)
    size, total = len(exact), sum(exact)
    # z^T A z on the unit sphere: the second moments of two squared entries are 3 and 1 over size (size + 2).
    squares = sum(value**2 for value in exact)
    variance = 2 * (size * squares - total**2) / (size**2 * (size + 2))
    error = rho**2 / 2 * (variance / count) ** 0.5
    assert abs(found.mean - rho**2 / 2 * total / size) <= 4 * error
    assert found.error == pytest.approx(error, rel=0.25)


def test_the_slope_does_not_enter_the_average():
    w = torch.nn.Parameter(torch.zeros(3, dtype=torch.float64))
    slope = torch.tensor([100.0, -50.0, 7.0], dtype=torch.float64)
    objective = Objective({"w": w}, lambda _: slope @ w + (w**2).sum(), [(None, 1)])
    mean, error = average_sharpness(objective, rho=0.1, directions=4)
    assert mean == pytest.approx(0.01, rel=1e-9) and error <= 1e-12


@pytest.mark.parametrize(
    "measured",
    [
        lambda o: rise(o, ASAMPerturbation()),
        lambda o: sam_sharpness(o, 0.1, steps=3),
        lambda o: m_sharpness(o, 3, 0.1),
        lambda o: average_sharpness(o, 0.1, 3),
    ],
)
def test_the_weights_come_back_also_after_an_exception(measured):
    problem = Problem()
    before = copied(problem.params)
    measured(objective_of_problem(problem))
    assert_same(before, copied(problem.params))
    for allowed in (1, 2):
        objective = objective_of_problem(problem)
        calls, plain = 0, objective.loss_of

        def breaking(batch, allowed=allowed, plain=plain):
            nonlocal calls
            calls += 1
            if calls > 2 * allowed + 1:
                raise RuntimeError("injected")
            return plain(batch)

        objective.loss_of = breaking
        with pytest.raises(RuntimeError, match="injected"):
            measured(objective)
        assert_same(before, copied(problem.params))


@pytest.mark.parametrize(
    ("measured", "message"),
    [
        (lambda o: sam_sharpness(o, 0), "rho=0"),
        (lambda o: sam_sharpness(o, steps=0), "ascent_steps=0"),
        (lambda o: asam_sharpness(o, -1), "asam_rho=-1"),
        (lambda o: asam_sharpness(o, eta=-1), "eta=-1"),
        (lambda o: m_sharpness(o, 0), "m=0"),
        (lambda o: average_sharpness(o, directions=1), "directions=1"),
        (lambda o: average_sharpness(o, float("nan")), "rho=nan"),
    ],
)
def test_arguments_that_are_not_allowed(measured, message):
    with pytest.raises(ValueError, match=message):
        measured(quadratic(torch.eye(2)))
