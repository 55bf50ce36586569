"""GSAM's displacement, radius and update."""

import math

import pytest
import torch

from composer_sassha.perturbations import GSAMPerturbation
from tests.perturbations.points import DTYPES, assert_displaces, combine, norm

GROUP = {"lr": 0.4, "initial_lr": 1.0}


@pytest.mark.parametrize("dtypes", DTYPES.values(), ids=DTYPES)
def test_displaces_as_sam_does_by_the_radius_of_the_learning_rate(dtypes):
    gsam = GSAMPerturbation(rho_max=0.9, rho_min=0.3, lr_min=0.2)
    rho = 0.3 + 0.6 * 0.2 / 0.8
    metrics = assert_displaces(gsam, lambda w, g: [rho * g_i / norm(g) for g_i in g], dtypes, group=GROUP)
    assert metrics["rho"] == pytest.approx(rho)


@pytest.mark.parametrize(
    ("lr", "rho"),
    [(1.0, 0.9), (0.6, 0.6), (0.4, 0.45), (0.2, 0.3), (0.1, 0.3), (0.0, 0.3), (2.0, 0.9)],
)
def test_the_radius_falls_with_the_learning_rate_and_stays_within_its_bounds(lr, rho):
    gsam = GSAMPerturbation(rho_max=0.9, rho_min=0.3, lr_min=0.2)
    assert gsam.radius({"lr": lr, "initial_lr": 1.0}) == pytest.approx(rho, abs=1e-12)


@pytest.mark.parametrize(
    ("group", "lr_max"),
    [({"initial_lr": 0.04, "max_lr": 1.0}, None), ({"initial_lr": 0.1}, 1.0), ({}, 1.0)],
)
@pytest.mark.parametrize(("lr", "rho"), [(1.0, 0.9), (0.6, 0.6), (0.2, 0.3), (0.04, 0.3)])
def test_the_largest_rate_is_the_schedulers_or_the_given_one(lr, rho, group, lr_max):
    gsam = GSAMPerturbation(rho_max=0.9, rho_min=0.3, lr_min=0.2, lr_max=lr_max)
    assert gsam.radius({"lr": lr, **group}) == pytest.approx(rho, abs=1e-12)
    assert gsam.radius({"lr": torch.tensor(lr), **group}) == pytest.approx(rho, abs=1e-6)


@pytest.mark.parametrize("lr", [1.0, 0.2, 0.1, 0.0])
def test_without_a_schedule_the_radius_is_the_largest(lr):
    gsam = GSAMPerturbation(rho_max=0.9, rho_min=0.3, lr_min=0.2)
    assert gsam.radius({"lr": lr}) == pytest.approx(0.9)
    assert gsam.radius({}) == pytest.approx(0.9)


def test_a_schedule_that_goes_nowhere_keeps_the_largest_radius():
    gsam = GSAMPerturbation(0.9, 0.3, lr_min=0.2)
    assert gsam.radius({"lr": 0.2, "initial_lr": 0.2}) == pytest.approx(0.9)


@pytest.mark.parametrize("alpha", [0.0, 0.3, 2.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_subtracts_alpha_times_the_part_that_is_orthogonal_to_the_gradient_at_w_plus_e(alpha, dtype):
    torch.manual_seed(1)
    g, g_p = torch.randn(50, dtype=dtype), torch.randn(50, dtype=dtype)
    kept = g.clone()
    parallel = (g @ g_p) / (g_p @ g_p) * g_p
    expected = g_p - alpha * (g - parallel)
    update, remembered = combine(GSAMPerturbation(alpha=alpha), g, g_p)
    torch.testing.assert_close(update, expected)
    assert remembered is None and torch.equal(g, kept)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_gradient_at_w_that_is_not_finite_takes_no_part(bad):
    update, _ = combine(GSAMPerturbation(alpha=0.5), torch.tensor([bad, 1.0]), torch.tensor([3.0, 4.0]))
    assert update.tolist() == [3.0, 4.0]


def test_gradients_of_zero_stay_finite():
    gsam, zero, some = GSAMPerturbation(alpha=0.5), torch.zeros(2), torch.tensor([3.0, 4.0])
    assert combine(gsam, zero, some.clone())[0].tolist() == [3.0, 4.0]
    assert combine(gsam, some, zero.clone())[0].tolist() == [0.0, 0.0]
    assert combine(gsam, zero, zero.clone())[0].tolist() == [0.0, 0.0]


def test_logs_the_surrogate_gap_and_the_eigenvalue_that_it_tells():
    gsam = GSAMPerturbation(rho_max=0.9, rho_min=0.3, lr_min=0.2)
    assert gsam.metrics(0.81) == {"loss_gap": 0.81, "dominant_eigenvalue": pytest.approx(2.0)}
    assert_displaces(gsam, lambda w, g: [0.45 * g_i / norm(g) for g_i in g], DTYPES["float64"], group=GROUP)
    expected = pytest.approx(2 * 0.81 / 0.45**2)  # the radius of the latest displacement
    assert gsam.metrics(0.81) == {"loss_gap": 0.81, "dominant_eigenvalue": expected}


def test_without_a_radius_there_is_no_eigenvalue():
    assert GSAMPerturbation(0, 0).metrics(0.5) == {"loss_gap": 0.5}
