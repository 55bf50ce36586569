"""SASSHA against its equations; what all update rules owe their users is tested in test_rules.py."""

import pytest
import torch
from torch import nn

from composer_sassha import SASSHA
from tests.optim.rules import assert_close, feed, parameters


@pytest.mark.parametrize("power", [0.0, 0.5, 0.7, 1.0])
def test_follows_the_equations(power):
    params = parameters()
    w = [p.detach().clone() for p in params]
    m, d, corrections = [0.0] * len(w), [0.0] * len(w), [None] * len(w)
    lr, b1, b2, eps, decay = 0.1, 0.8, 0.95, 1e-3, 0.2
    optimizer = SASSHA(params, lr, (b1, b2), eps, decay, power)
    for t, grads, estimates in feed(optimizer, params, range(1, 51)):
        for i, g in enumerate(grads):
            if i in estimates:
                d[i] = b2 * d[i] + (1 - b2) * estimates[i].abs()
                corrections[i] = 1 - b2**t
            m[i] = b1 * m[i] + (1 - b1) * g
            if corrections[i] is not None:
                step = (m[i] / (1 - b1**t)) / ((d[i] / corrections[i]) ** power + eps)
                w[i] = w[i] - lr * step - lr * decay * w[i]
        assert_close(params, w)


def test_half_precision_rounds_once_from_float32_state():
    p = nn.Parameter(torch.tensor([1.0], dtype=torch.bfloat16))
    optimizer = SASSHA([p], lr=0.5, betas=(0.9, 0.999), weight_decay=0.01)
    p.grad = torch.tensor([1e-3], dtype=torch.bfloat16)
    optimizer.update_curvature({p: torch.ones_like(p)})
    optimizer.step()
    g = p.grad.double().item()
    assert p.item() == torch.tensor(1 - 0.5 * 0.01 - 0.5 * g / (1 + 1e-4)).bfloat16().item()
    assert optimizer.state[p]["exp_avg"].dtype == torch.float32


def test_a_step_before_any_estimate_names_the_algorithm():
    p = nn.Parameter(torch.ones(2))
    p.grad = torch.ones(2)
    with pytest.raises(RuntimeError, match=r"SASSHA: .* add composer_sassha.Sassha\(\) or LazyHessian\(\)"):
        SASSHA([p]).step()
