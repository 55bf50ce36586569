"""AdaHessian against its equations; what all update rules owe their users is tested in test_rules.py."""

import re

import pytest
import torch
from torch import nn

from composer_sassha.optim import AdaHessian
from tests.optim.rules import assert_close, feed, parameters


def averaged(h, block_size):
    """The paper's spatial average, entry by entry."""
    h = h.clone()
    if h.ndim >= 4:
        for out in range(h.shape[0]):
            for channel in range(h.shape[1]):
                h[out, channel] = h[out, channel].sum() / h[out, channel].numel()
    elif h.ndim == 2:
        entries = [h[row, column].item() for row in range(h.shape[0]) for column in range(h.shape[1])]
        for start in range(0, len(entries), block_size):
            block = entries[start : start + block_size]
            entries[start : start + block_size] = [sum(block) / block_size] * block_size
        h = torch.tensor(entries, dtype=h.dtype).view(h.shape)
    return h


@pytest.mark.parametrize("power", [0.0, 0.5, 0.7, 1.0])
@pytest.mark.parametrize("block_size", [1, 2, 6])  # a block of 6 spans rows of 4
def test_follows_the_equations(power, block_size):
    params = parameters()
    w = [p.detach().clone() for p in params]
    m, v, r = [0.0] * len(w), [0.0] * len(w), [0] * len(w)
    lr, b1, b2, eps, decay = 0.1, 0.8, 0.95, 1e-3, 0.2
    optimizer = AdaHessian(params, lr, (b1, b2), eps, decay, power, block_size)
    for t, grads, estimates in feed(optimizer, params, range(1, 51)):
        for i, g in enumerate(grads):
            if i in estimates:
                v[i] = b2 * v[i] + (1 - b2) * averaged(estimates[i], block_size) ** 2
                r[i] += 1
            m[i] = b1 * m[i] + (1 - b1) * g
            if r[i]:
                denominator = (v[i] / (1 - b2 ** r[i])).sqrt() ** power + eps
                w[i] = w[i] - lr * (m[i] / (1 - b1**t)) / denominator - lr * decay * w[i]
        assert_close(params, w)


def test_with_an_estimate_every_step_both_corrections_count_steps():
    p = nn.Parameter(torch.ones(3))
    optimizer = AdaHessian([p])
    for _ in range(4):
        p.grad = torch.ones(3)
        optimizer.update_curvature({p: torch.ones(3)})
        optimizer.step()
    assert optimizer.state[p]["hessian_step"] == optimizer.state[p]["step"] == 4


def test_the_spatial_average_is_signed():
    p = nn.Parameter(torch.ones(1, 1, 1, 2))
    p.grad = torch.ones_like(p)
    optimizer = AdaHessian([p], betas=(0.0, 0.0))
    estimate = torch.tensor([[[[3.0, -1.0]]]])
    optimizer.update_curvature({p: estimate})
    assert optimizer.state[p]["exp_hessian_sq"].tolist() == [[[[1.0, 1.0]]]]
    assert estimate.tolist() == [[[[3.0, -1.0]]]]


def test_a_tensor_of_three_dimensions_is_not_averaged():
    p = nn.Parameter(torch.ones(1, 1, 2))
    optimizer = AdaHessian([p], betas=(0.0, 0.0))
    optimizer.update_curvature({p: torch.tensor([[[3.0, -1.0]]])})
    assert optimizer.state[p]["exp_hessian_sq"].tolist() == [[[9.0, 1.0]]]


def test_the_memory_layout_does_not_matter():
    def layouts(t):
        t = t.double()
        return t.clone(memory_format=torch.channels_last) if t.ndim == 4 else t.T.contiguous().T

    torch.manual_seed(0)
    for shape in ((2, 3, 3, 2), (6, 4)):
        w, *draws = (torch.randn(shape, dtype=torch.float64) for _ in range(7))
        plain, other = nn.Parameter(w.clone()), nn.Parameter(layouts(w))
        assert plain.stride() != other.stride()
        plain_optimizer, other_optimizer = (AdaHessian([p], block_size=8) for p in (plain, other))
        for grad, estimate in zip(draws[::2], draws[1::2], strict=True):
            plain.grad, other.grad = grad, layouts(grad)
            plain_optimizer.update_curvature({plain: estimate})
            other_optimizer.update_curvature({other: layouts(estimate)})
            plain_optimizer.step()
            other_optimizer.step()
        assert other.stride() == other_optimizer.state[other]["exp_hessian_sq"].stride()
        torch.testing.assert_close(plain, other, rtol=1e-12, atol=1e-12)


def test_a_block_size_must_divide_every_matrix_of_its_group():
    matrix, kernel, vector = (nn.Parameter(torch.ones(shape)) for shape in ((3, 5), (2, 2, 3), (7,)))
    line = (
        "AdaHessian: block_size=4 is not allowed for a parameter of shape (3, 5); it must divide 15, its "
        "number of entries (1: no averaging)"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(line)}$"):
        AdaHessian([matrix], block_size=4)
    AdaHessian([kernel, vector], block_size=4)  # neither is a matrix

    optimizer = AdaHessian([{"params": [kernel, vector]}, {"params": [matrix], "block_size": 5}])
    optimizer.update_curvature({matrix: torch.arange(15.0).view(3, 5)})
    mean_squares = optimizer.state[matrix]["exp_hessian_sq"] / 1e-3
    torch.testing.assert_close(mean_squares, torch.tensor([[4.0], [49.0], [144.0]]).expand(3, 5))
    with pytest.raises(ValueError, match="block_size=2"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(3, 3))], "block_size": 2})
    assert len(optimizer.param_groups) == 2
