"""LookSAM's displacement, what it keeps, and how it uses that."""

import math

import pytest
import torch

from composer_sassha.perturbations import LookSAMPerturbation
from tests.perturbations.points import DTYPES, assert_displaces, combine, norm, reuse


@pytest.mark.parametrize("dtypes", DTYPES.values(), ids=DTYPES)
def test_displaces_as_sam_does(dtypes):
    assert_displaces(LookSAMPerturbation(rho=0.7), lambda w, g: [0.7 * g_i / norm(g) for g_i in g], dtypes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_updates_with_the_gradient_at_w_plus_e_and_keeps_its_part_orthogonal_to_the_one_at_w(dtype):
    torch.manual_seed(1)
    g, g_s = torch.randn(50, dtype=dtype), torch.randn(50, dtype=dtype)
    kept, expected = g.clone(), g_s - (g @ g_s) / (g @ g) * g
    update, g_v = combine(LookSAMPerturbation(), g, g_s.clone())
    assert torch.equal(update, g_s) and torch.equal(g, kept)
    torch.testing.assert_close(g_v, expected)
    assert abs((g_v @ g).item()) <= 50 * torch.finfo(dtype).eps * (g_s.norm() * g.norm()).item()


@pytest.mark.parametrize("alpha", [0.0, 0.7, 3.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_in_between_adds_what_it_kept_at_alpha_times_the_gradients_norm(alpha, dtype):
    torch.manual_seed(1)
    g, g_v = torch.randn(50, dtype=dtype), torch.randn(50, dtype=dtype)
    kept, expected = g_v.clone(), g + alpha * g.norm() / g_v.norm() * g_v
    torch.testing.assert_close(reuse(LookSAMPerturbation(alpha=alpha), g, g_v), expected)
    assert torch.equal(g_v, kept)


@pytest.mark.parametrize("bad", [0.0, math.nan, math.inf, -math.inf])
def test_without_a_direction_at_w_nothing_is_kept(bad):
    g = torch.tensor([bad, 0.0])
    update, g_v = combine(LookSAMPerturbation(), g, torch.tensor([3.0, 4.0]))
    assert update.tolist() == [3.0, 4.0] and g_v.tolist() == [0.0, 0.0]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_gradient_at_w_plus_e_that_is_not_finite_is_not_kept(bad):
    _, g_v = combine(LookSAMPerturbation(), torch.tensor([1.0, 0.0]), torch.tensor([bad, 4.0]))
    assert g_v.tolist() == [0.0, 0.0]


@pytest.mark.parametrize("bad", [0.0, math.nan, math.inf, -math.inf])
def test_without_anything_to_reuse_the_gradient_is_left_as_it_is(bad):
    update = reuse(LookSAMPerturbation(), torch.tensor([3.0, 4.0]), torch.tensor([bad, 0.0]))
    assert update.tolist() == [3.0, 4.0]


def test_a_gradient_of_zero_stays_zero():
    assert reuse(LookSAMPerturbation(), torch.zeros(2), torch.ones(2)).tolist() == [0.0, 0.0]
