"""Stable SAM's displacement and update."""

import math

import pytest
import torch

from composer_sassha.perturbations import SSAMPerturbation
from tests.perturbations.points import DTYPES, assert_displaces, combine, norm


@pytest.mark.parametrize("dtypes", DTYPES.values(), ids=DTYPES)
def test_displaces_as_sam_does(dtypes):
    assert_displaces(SSAMPerturbation(rho=0.7), lambda w, g: [0.7 * g_i / norm(g) for g_i in g], dtypes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gives_the_gradient_at_w_plus_e_the_norm_of_the_one_at_w(dtype):
    torch.manual_seed(1)
    g, g_p = torch.randn(50, dtype=dtype), torch.randn(50, dtype=dtype)
    kept, expected = g.clone(), g.norm() / g_p.norm() * g_p
    update, remembered = combine(SSAMPerturbation(), g, g_p)
    torch.testing.assert_close(update, expected)
    assert remembered is None and torch.equal(g, kept)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_gradient_at_w_that_is_not_finite_leaves_the_other_as_it_is(bad):
    update, _ = combine(SSAMPerturbation(), torch.tensor([bad, 1.0]), torch.tensor([3.0, 4.0]))
    assert update.tolist() == [3.0, 4.0]


def test_gradients_of_zero_stay_finite():
    ssam, zero, some = SSAMPerturbation(), torch.zeros(2), torch.tensor([3.0, 4.0])
    assert combine(ssam, zero, some.clone())[0].tolist() == [0.0, 0.0]  # at w there is nothing to follow
    assert combine(ssam, some, zero.clone())[0].tolist() == [0.0, 0.0]
