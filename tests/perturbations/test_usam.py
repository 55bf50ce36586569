"""USAM's displacement and update."""

import pytest
import torch

from composer_sassha.perturbations import SSAMPerturbation, USAMPerturbation
from tests.perturbations.points import DTYPES, assert_displaces, combine, norm, tensors


@pytest.mark.parametrize("renormalize", [False, True])
@pytest.mark.parametrize("dtypes", DTYPES.values(), ids=DTYPES)
def test_displaces_by_rho_times_the_gradient(dtypes, renormalize):
    usam = USAMPerturbation(0.7, renormalize)
    metrics = assert_displaces(usam, lambda w, g: [0.7 * g_i for g_i in g], dtypes)
    assert metrics == {"rho": 0.7, "grad_norm": pytest.approx(norm(tensors(2, dtypes)), rel=1e-6)}


def test_renormalized_it_updates_as_stable_sam_does():
    torch.manual_seed(1)
    g, g_p = torch.randn(50), torch.randn(50)
    update, remembered = combine(USAMPerturbation(renormalize=True), g, g_p.clone())
    assert torch.equal(update, combine(SSAMPerturbation(), g, g_p)[0]) and remembered is None
    torch.testing.assert_close(update.norm(), g.norm())


def test_whether_both_gradients_take_part_is_a_choice():
    assert USAMPerturbation(renormalize=True).mixes and not USAMPerturbation().mixes
