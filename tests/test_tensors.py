"""Operations on lists of tensors."""

import torch

from composer_sassha.common.tensors import copy_into


def test_targets_of_several_dtypes_each_get_their_own_values(monkeypatch):
    calls, copy = [], torch._foreach_copy_
    monkeypatch.setattr(torch, "_foreach_copy_", lambda to, given: (calls.append(to), copy(to, given)))
    targets = [torch.zeros(3, dtype=dtype) for dtype in (torch.float32, torch.bfloat16, torch.float32)]
    copy_into(targets, [torch.full((3,), float(i)) for i in range(3)])
    assert [t.tolist() for t in targets] == [[0.0] * 3, [1.0] * 3, [2.0] * 3]
    assert all(len({t.dtype for t in to}) == 1 for to in calls), "a mixed call is wrong on CUDA"


def test_nothing_to_copy():
    copy_into([], [])
