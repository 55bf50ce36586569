"""SAM's displacement."""

import math

import pytest
import torch

from composer_sassha.common.tensors import global_norm
from composer_sassha.perturbations import SAMPerturbation
from tests.perturbations.points import DTYPES, assert_displaces, displace, norm, tensors


@pytest.mark.parametrize("dtypes", DTYPES.values(), ids=DTYPES)
def test_displaces_by_rho_along_the_gradient_of_all_parameters_together(dtypes):
    metrics = assert_displaces(
        SAMPerturbation(rho=0.7), lambda w, g: [0.7 * g_i / norm(g) for g_i in g], dtypes
    )
    assert metrics == {"rho": 0.7, "grad_norm": pytest.approx(norm(tensors(2, dtypes)), rel=1e-6)}


@pytest.mark.parametrize("dtypes", DTYPES.values(), ids=DTYPES)
def test_in_the_maximum_norm_displaces_every_entry_by_rho(dtypes):
    metrics = assert_displaces(
        SAMPerturbation(rho=0.7, p=math.inf), lambda w, g: [0.7 * g_i.sign() for g_i in g], dtypes
    )
    assert metrics == {"rho": 0.7, "grad_norm": pytest.approx(norm(tensors(2, dtypes)), rel=1e-6)}


def test_in_the_maximum_norm_an_entry_without_a_gradient_stays():
    w = torch.ones(3)
    displace(SAMPerturbation(0.5, p=math.inf), [w], [torch.tensor([2.0, 0.0, -1e-30])])
    assert w.tolist() == [1.5, 1.0, 0.5]


def test_a_radius_of_zero_displaces_by_nothing():
    w = torch.tensor([0.1, 0.7])
    displace(SAMPerturbation(0), [w], [torch.ones(2)])
    assert torch.equal(w, torch.tensor([0.1, 0.7]))


def test_norms_of_half_precision_gradients_do_not_overflow():
    assert global_norm([torch.full((10_000,), 3e4, dtype=torch.float16)]) == pytest.approx(3e6, rel=1e-5)
    assert global_norm([]) == 0.0
