"""SAM's displacement."""

import pytest
import torch

from composer_sassha._tensors import global_norm
from composer_sassha.perturbations import SAMPerturbation


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_displaces_by_rho_along_the_gradient_of_all_parameters_together(dtype):
    torch.manual_seed(0)
    params = [torch.randn(3, 2, dtype=dtype), torch.randn(4, dtype=dtype), torch.randn((), dtype=dtype)]
    grads = [torch.randn_like(p) for p in params]
    norm = torch.cat([g.double().flatten() for g in grads]).norm()
    expected = [p.double() + 0.7 * g.double() / norm for p, g in zip(params, grads, strict=True)]
    metrics = SAMPerturbation(rho=0.7).displace(params, grads)
    for p, e in zip(params, expected, strict=True):
        torch.testing.assert_close(
            p.double(), e, rtol=4 * torch.finfo(dtype).eps, atol=4 * torch.finfo(dtype).eps
        )
    assert metrics["rho"] == 0.7 and metrics["grad_norm"] == pytest.approx(norm.item(), rel=1e-6)


def test_norms_of_half_precision_gradients_do_not_overflow():
    assert global_norm([torch.full((10_000,), 3e4, dtype=torch.float16)]) == pytest.approx(3e6, rel=1e-5)
    assert global_norm([]) == 0.0


def test_mixed_dtypes():
    params = [torch.zeros(1), torch.zeros(1, dtype=torch.float64), torch.zeros(1, dtype=torch.bfloat16)]
    grads = [torch.full_like(p, value) for p, value in zip(params, (2.0, 3.0, 6.0), strict=True)]
    SAMPerturbation(7.0).displace(params, grads)
    assert [p.item() for p in params] == pytest.approx([2.0, 3.0, 6.0], rel=1e-6)


def test_a_zero_gradient_displaces_by_nothing():
    w = torch.ones(2)
    SAMPerturbation(1.0).displace([w], [torch.zeros(2)])
    assert w.tolist() == [1.0, 1.0]


@pytest.mark.parametrize("rho", [-0.1, float("inf"), float("nan"), "0.1", True])
def test_bad_rho_is_refused(rho):
    with pytest.raises((ValueError, TypeError), match="SAM: rho="):
        SAMPerturbation(rho)
