"""Operations on lists of tensors."""

import pytest
import torch

from composer_sassha.common.tensors import add_scaled_, copy_into


def test_targets_of_several_dtypes_each_get_their_own_values(monkeypatch):
    calls, copy = [], torch._foreach_copy_
    monkeypatch.setattr(torch, "_foreach_copy_", lambda to, given: (calls.append(to), copy(to, given)))
    targets = [torch.zeros(3, dtype=dtype) for dtype in (torch.float32, torch.bfloat16, torch.float32)]
    copy_into(targets, [torch.full((3,), float(i)) for i in range(3)])
    assert [t.tolist() for t in targets] == [[0.0] * 3, [1.0] * 3, [2.0] * 3]
    assert all(len({t.dtype for t in to}) == 1 for to in calls), "a mixed call is wrong on CUDA"


def test_nothing_to_copy():
    copy_into([], [])


DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(), (1,), (7, 5), (3, 2, 4)]


def lists(*dtypes):
    torch.manual_seed(5)
    return [[torch.randn(shape).to(dtype) for shape in SHAPES] for dtype in dtypes]


@pytest.mark.parametrize("spare", [False, True])
@pytest.mark.parametrize("dtype", DTYPES[:2])
def test_a_tensor_scales_as_a_number_does_to_the_last_bit(dtype, spare):
    for norm in (0.3, 7.0, 1e-3):
        targets, tensors = lists(dtype, dtype)
        expected, before = [t.clone() for t in targets], [t.clone() for t in tensors]
        torch._foreach_add_(expected, tensors, alpha=0.05 / norm)
        scale = torch.full((), 0.05, dtype=torch.float64) / torch.full((), norm, dtype=torch.float64)
        add_scaled_(targets, tensors, scale, spare=spare)
        assert all(map(torch.equal, targets, expected))
        assert spare or all(map(torch.equal, tensors, before))


@pytest.mark.parametrize("dtype", DTYPES[2:])
@pytest.mark.parametrize("scale", [0.3, 5e-8, 3e5])  # float16 holds neither of the last two
def test_half_precision_is_scaled_in_float32(scale, dtype):
    targets, tensors = lists(dtype, torch.float32)
    tensors = [(t * min(1 / scale, 1e4)).to(dtype) for t in tensors]
    exact = [t.double() + scale * g.double() for t, g in zip(targets, tensors, strict=True)]
    add_scaled_(targets, tensors, torch.tensor(scale))
    for found, expected in zip(targets, exact, strict=True):
        assert torch.equal(found, expected.float().to(dtype))


@pytest.mark.parametrize("spare", [False, True])
def test_a_scale_of_zero_adds_nothing_at_all(spare):
    targets, mixed = [t for dtype in DTYPES for t in lists(dtype)[0]], []
    for i, t in enumerate(targets):
        mixed.append(torch.full_like(t, [torch.nan, torch.inf, -torch.inf, 1.0][i % 4]))
    before = [t.clone() for t in targets]
    add_scaled_(targets, mixed, torch.tensor(0.0, dtype=torch.float64), spare=spare)
    assert all(map(torch.equal, targets, before))
