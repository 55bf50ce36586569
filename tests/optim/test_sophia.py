"""Sophia against its equations; what all update rules owe their users is tested in test_rules.py."""

import pytest
import torch
from torch import nn

from composer_sassha.optim import Sophia
from tests.optim.rules import assert_close, feed, parameters


@pytest.mark.parametrize(("gamma", "eps"), [(1.0, 1e-12), (3.0, 0.3), (0.0, 0.1)])
def test_follows_the_equations(gamma, eps):
    params = parameters()
    w = [p.detach().clone() for p in params]
    m, h = [0.0] * len(w), [None] * len(w)
    lr, b1, b2, decay = 0.1, 0.8, 0.7, 0.2
    optimizer = Sophia(params, lr, (b1, b2), eps, decay, gamma)
    clipped = []
    for _, grads, estimates in feed(optimizer, params, range(1, 51)):
        for i, g in enumerate(grads):
            if i in estimates:
                h[i] = b2 * (0.0 if h[i] is None else h[i]) + (1 - b2) * estimates[i]
            m[i] = b1 * m[i] + (1 - b1) * g
            if h[i] is not None:
                ratio = m[i] / (gamma * h[i]).clamp(min=eps)
                w[i] = w[i] - lr * decay * w[i] - lr * ratio.clamp(-1, 1)
                clipped.append((ratio.abs() >= 1).double().mean().item())
        assert_close(params, w)
    assert 0.1 < sum(clipped) / len(clipped) < 0.9


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("eps", [1e-12, 1e-300, 0.0])
@pytest.mark.parametrize("gamma", [0.01, 0.0])
def test_overflowing_quotients_are_clipped_and_zero_stays(dtype, eps, gamma):
    m = torch.tensor([3e38, -3e38, 1e-30, 0.0, 0.0, 0.0, -1.0], dtype=dtype)
    h = torch.tensor([0.0, -1.0, 0.0, 0.0, -2.0, 1e-300, 1e-30], dtype=dtype)
    p = nn.Parameter(torch.zeros(7, dtype=dtype))
    optimizer = Sophia([p], lr=1.0, betas=(0.0, 0.0), eps=eps, clip_threshold=gamma)
    p.grad = m
    optimizer.update_curvature({p: h})
    optimizer.step()
    tiny = -1e-18 if eps == 1e-12 else -1.0
    expected = torch.tensor([-1.0, 1.0, tiny, 0.0, 0.0, 0.0, 1.0], dtype=dtype)
    torch.testing.assert_close(p.detach(), expected, rtol=1e-6, atol=0)


def test_newtons_step_where_curvature_is_large_or_the_sign():
    p = nn.Parameter(torch.zeros(3))
    optimizer = Sophia([p], lr=0.5, betas=(0.0, 0.0), clip_threshold=0.25)
    p.grad = torch.tensor([1.0, 1.0, -1.0])
    optimizer.update_curvature({p: torch.tensor([8.0, 4.0, -8.0])})
    optimizer.step()
    assert p.tolist() == [-0.25, -0.5, 0.5]


def test_estimates_keep_their_sign_and_start_uncorrected():
    p = nn.Parameter(torch.zeros(2))
    optimizer = Sophia([p], betas=(0.9, 0.5))
    optimizer.update_curvature({p: torch.tensor([4.0, -4.0])})
    assert optimizer.state[p]["exp_hessian"].tolist() == [2.0, -2.0]
    optimizer.update_curvature({p: torch.tensor([-4.0, -4.0])})
    assert optimizer.state[p]["exp_hessian"].tolist() == [-1.0, -3.0]
