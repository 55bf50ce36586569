"""ASAM's displacement."""

import pytest
import torch

from composer_sassha.perturbations import ASAMPerturbation, SAMPerturbation
from tests.helpers import assert_same
from tests.perturbations.points import DTYPES, NAMES, assert_displaces, displace, norm, tensors


def scales(w, eta):
    return [
        w_i.abs() + eta if "weight" in name else torch.ones_like(w_i)
        for name, w_i in zip(NAMES, w, strict=True)
    ]


@pytest.mark.parametrize("dtypes", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("eta", [0.0, 0.3])
def test_displaces_by_rho_t2_g_over_the_norm_of_t_g(dtypes, eta):
    def equation(w, g):
        t = scales(w, eta)
        tg = [t_i * g_i for t_i, g_i in zip(t, g, strict=True)]
        return [0.7 * t_i**2 * g_i / norm(tg) for t_i, g_i in zip(t, g, strict=True)]

    # T g is rounded to each tensor's own dtype, and enters all tensors by its norm.
    coarsest = max(torch.finfo(dtype).eps for dtype in dtypes)
    metrics = assert_displaces(ASAMPerturbation(0.7, eta), equation, dtypes, eps=coarsest, names=NAMES)
    t = scales([w.double() for w in tensors(1, dtypes)], eta)
    tg = [t_i * g_i.double() for t_i, g_i in zip(t, tensors(2, dtypes), strict=True)]
    assert metrics == {"rho": 0.7, "grad_norm": pytest.approx(norm(tg), rel=coarsest)}


def test_does_not_depend_on_the_scale_of_weights_in_the_loss():
    # For f(a w), the gradient is a times that at a w: the displacement of w is then 1 / a of that of a w.
    w, g, a = torch.tensor([3.0, -2.0]), torch.tensor([0.5, 4.0]), 8.0
    scaled = w / a
    displace(ASAMPerturbation(0.5, eta=0.0), [w], [g.clone()], ["weight"])
    displace(ASAMPerturbation(0.5, eta=0.0), [scaled], [g * a], ["weight"])
    torch.testing.assert_close(scaled * a, w)


def test_without_a_weight_among_the_names_it_is_sam():
    ours, theirs = tensors(1), tensors(1)
    names = ["bias", "gamma", "scale", "beta"]
    displace(ASAMPerturbation(0.5), ours, tensors(2), names)
    displace(SAMPerturbation(0.5), theirs, tensors(2))
    assert_same(ours, theirs)


def test_without_names_says_how_to_give_them():
    with pytest.raises(RuntimeError, match=r"ASAM needs the parameters' names; .*named_parameters="):
        displace(ASAMPerturbation(), tensors(1), tensors(2))
