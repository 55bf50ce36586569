"""Hutchinson's estimator against the full Hessian."""

import math

import pytest
import torch
from torch import nn

from composer_sassha.curvature import hutchinson_diagonal, rademacher


def problem():
    torch.manual_seed(2)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    x, y = torch.randn(8, 3, dtype=torch.float64), torch.randint(2, (8,))
    params = dict(model.named_parameters())

    def loss(p):
        return nn.functional.cross_entropy(torch.func.functional_call(model, p, (x,)), y)

    return params, loss


def full_hessian(params, loss):
    blocks = torch.func.hessian(loss)({name: p.detach() for name, p in params.items()})
    rows = [
        torch.cat([blocks[a][b].reshape(params[a].numel(), params[b].numel()) for b in params], dim=1)
        for a in params
    ]
    return torch.cat(rows)


def estimate(params, loss, keys):
    tensors = list(params.values())
    grads = torch.autograd.grad(loss(params), tensors, create_graph=True)
    return torch.cat([d.flatten() for d in hutchinson_diagonal(grads, tensors, keys)])


def test_one_probe_is_z_times_hz():
    params, loss = problem()
    hessian = full_hessian(params, loss)
    z = torch.cat([t.flatten() for t in rademacher(list(params.values()), (4, 2))])
    torch.testing.assert_close(estimate(params, loss, [(4, 2)]), z * (hessian @ z), rtol=1e-12, atol=1e-14)


def test_the_mean_of_many_estimates_is_the_diagonal():
    params, loss = problem()
    hessian = full_hessian(params, loss)
    diagonal = hessian.diagonal()
    samples = 4000
    mean = estimate(params, loss, [(0, k) for k in range(samples)])
    # Var of one probe: sum over j != i of H_ij^2. Bernstein's inequality for bounded terms, |z_i (Hz)_i -
    # H_ii| <= b, and a union bound over the entries: the test fails by chance with probability at most 1e-9.
    off = hessian - diagonal.diag()
    variance, b = (off**2).sum(dim=1), off.abs().sum(dim=1)
    log_term = math.log(2 * len(diagonal) / 1e-9)
    bound = (2 * variance * log_term / samples).sqrt() + 2 * b * log_term / (3 * samples)
    assert ((mean - diagonal).abs() <= bound).all()
    assert (bound < 0.25 * diagonal.abs().max()).all()  # the bound says something


def test_several_samples_are_the_mean_of_single_ones():
    params, loss = problem()
    keys = [(1, k) for k in range(3)]
    singles = torch.stack([estimate(params, loss, [key]) for key in keys]).mean(dim=0)
    torch.testing.assert_close(estimate(params, loss, keys), singles, rtol=1e-13, atol=1e-15)


def test_a_loss_that_is_linear_somewhere_has_no_curvature_there():
    a, b = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    grads = torch.autograd.grad((3 * a).sum() + (b**2).sum(), [a, b], create_graph=True)
    diagonals = hutchinson_diagonal(grads, [a, b], [(0,)])
    assert diagonals[0].tolist() == [0, 0] and diagonals[1].tolist() == [2, 2]
    grads = torch.autograd.grad((3 * a).sum(), [a], create_graph=True)
    assert hutchinson_diagonal(grads, [a], [(0,)])[0].tolist() == [0, 0]


def test_half_precision_is_gathered_in_float32():
    w = nn.Parameter(torch.tensor([1.0, 2.0], dtype=torch.bfloat16))
    grads = torch.autograd.grad((w**3).sum(), [w], create_graph=True)
    (diagonal,) = hutchinson_diagonal(grads, [w], [(0,), (1,)])
    assert diagonal.dtype == torch.float32 and diagonal.tolist() == [6.0, 12.0]


@pytest.mark.parametrize("key", [(0,), (1, 2, 3, 4, 5)])
def test_probes_are_signs_determined_by_their_key(key):
    like = [torch.zeros(100, 3), torch.zeros(7, dtype=torch.float64), torch.zeros(())]
    z = rademacher(like, key)
    assert [t.shape for t in z] == [t.shape for t in like] and z[1].dtype == torch.float64
    assert all(set(t.flatten().tolist()) <= {-1.0, 1.0} for t in z)
    state = torch.get_rng_state()
    again = rademacher(like, key)
    assert all(torch.equal(a, b) for a, b in zip(z, again, strict=True))
    assert torch.equal(state, torch.get_rng_state())  # the global generator is left alone
    other = rademacher(like, (*key[:-1], key[-1] + 1))
    assert not torch.equal(z[0], other[0])
    # 300 fair signs: |sum| > 120 has probability below 2 exp(-120^2 / 600) = 8e-11 (Hoeffding)
    assert z[0].sum().abs() <= 120 and (z[0] * other[0]).sum().abs() <= 120
