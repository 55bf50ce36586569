"""All numbers at once: each is that of its own function, with the settings that were asked for."""

import sys

import pytest
import torch

from composer_sassha.sharpness import (
    Measures,
    asam_sharpness,
    average_sharpness,
    m_sharpness,
    measure,
    sam_sharpness,
    top_eigenvalues,
    trace,
)
from composer_sassha.sharpness.measures import Deadline, eigenvalue_metrics
from composer_sassha.sharpness.objective import Unfinished
from tests.curvature.problems import Problem
from tests.sharpness.problems import objective_of_problem, quadratic, symmetric

UNUSUAL = Measures(
    eigenvalues=6,
    tol=1e-9,
    trace_samples=3,
    rho=0.2,
    ascent_steps=3,
    m=(2, 3),
    directions=4,
    asam_rho=0.7,
    seed=5,
)


@pytest.mark.parametrize("measures", [UNUSUAL, Measures(m=(4,), trace_samples=2)])
def test_every_number_is_that_of_its_function(measures):
    problem = Problem()
    objective = objective_of_problem(problem)
    rho, steps, seed = measures.rho, measures.ascent_steps, measures.seed
    gap = sam_sharpness(objective, rho, 1)
    values = top_eigenvalues(objective, measures.eigenvalues, measures.tol, seed).tolist()
    average, average_error = average_sharpness(objective, rho, measures.directions, seed)
    mean, error = trace(objective, measures.trace_samples, seed)
    exact = {
        "loss": problem.loss().item(),
        "full_grad_norm": problem.gradient().norm().item(),
        "surrogate_gap": gap,
        "gap_eigenvalue": 2 * gap / rho**2,
        "sam": sam_sharpness(objective, rho, steps),
        "asam": asam_sharpness(objective, measures.asam_rho),
        "average": average,
        "average_error": average_error,
        **{f"m{m}": m_sharpness(objective, m, rho, steps) for m in measures.m},
        **{f"lambda_{i + 1}": value for i, value in enumerate(values)},
        "lambda_max": values[0],
        "lambda_max_over_lambda_5": values[0] / values[4],
        "trace": mean,
        "trace_error": error,
    }
    found = measure(objective, measures)
    assert list(found) == list(exact), "the cheap ones first"
    assert found == pytest.approx(exact, rel=1e-12)


def test_the_eigenvalues_are_as_exact_as_was_asked_for(monkeypatch):
    asked = []
    module = sys.modules[Measures.__module__]  # the package has the function under its name
    monkeypatch.setattr(module, "top_eigenvalues", lambda *a: asked.append(a[1:]) or torch.tensor([1.0]))
    measure(quadratic(symmetric([1.0, 2.0])), UNUSUAL)
    assert asked == [(6, 1e-9, 5)]


def test_a_ratio_needs_a_fifth_eigenvalue_above_zero():
    assert eigenvalue_metrics([8.0, 6.0, 5.0, 4.0, 2.0, 1.0])["lambda_max_over_lambda_5"] == 4.0
    for values in ([8.0, 6.0, 5.0, 4.0], [8.0, 6.0, 5.0, 4.0, 0.0], [8.0, 6.0, 5.0, 4.0, -1.0]):
        named = eigenvalue_metrics(values)
        assert "lambda_max_over_lambda_5" not in named and named["lambda_max"] == 8.0
    assert eigenvalue_metrics([]) == {}


def test_a_part_is_left_out_by_a_setting():
    objective = objective_of_problem(Problem())
    found = measure(objective, Measures(eigenvalues=0, trace_samples=0, m=(), directions=0, asam_rho=0))
    assert set(found) == {"loss", "full_grad_norm", "surrogate_gap", "gap_eigenvalue", "sam"}


def test_group_sizes_may_be_a_list():
    assert Measures(m=[2, 3]) == Measures(m=(2, 3)) and hash(Measures(m=[2, 3]))


def test_a_deadline_is_over_when_its_time_is_and_no_sooner(monkeypatch):
    now = 10.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    tick = Deadline(5.0, torch.device("cpu"))
    for now in (10.0, 14.9, 15.0):  # noqa: B007  # the clock's
        tick()
    now = 15.1
    with pytest.raises(Unfinished, match="time is over"):
        tick()
