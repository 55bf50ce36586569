"""The learning rate as a fraction of the largest, under torch's schedulers."""

import pytest
import torch
from torch.optim.lr_scheduler import CosineAnnealingLR, CyclicLR, LinearLR, OneCycleLR

from composer_sassha.common.rates import fraction_of_largest_rate, rate_of


def fractions(make, steps=12, **known):
    base = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=0.1)
    scheduler, found = make(base), []
    for _ in range(steps):
        found.append((base.param_groups[0]["lr"], fraction_of_largest_rate(base.param_groups[0], **known)))
        base.step()
        scheduler.step()
    return found


@pytest.mark.parametrize(
    ("make", "largest", "known"),
    [
        (lambda base: CosineAnnealingLR(base, 12), 0.1, {}),
        (lambda base: LinearLR(base, 0.25, 1.0, 6), 0.1, {}),
        (lambda base: OneCycleLR(base, 0.5, total_steps=13), 0.5, {}),
        (lambda base: CyclicLR(base, 0.1, 0.5, step_size_up=4), 0.5, {"lr_max": 0.5}),
    ],
)
def test_the_fraction_is_that_of_the_largest_rate(make, largest, known):
    for lr, fraction in fractions(make, **known):
        assert fraction == pytest.approx(lr / largest) and fraction <= 1


def test_a_largest_rate_that_is_not_known_never_gives_more_than_one():
    assert max(f for _, f in fractions(lambda base: CyclicLR(base, 0.1, 0.5, step_size_up=4))) == 1


def test_tensors_and_none_are_rates():
    assert rate_of({"lr": torch.tensor(0.25)}) == 0.25
    assert rate_of({"lr": None}) == rate_of({}) == 0.0
    assert fraction_of_largest_rate({"lr": torch.tensor(0.25), "initial_lr": torch.tensor(0.5)}) == 0.5
    assert fraction_of_largest_rate({"lr": None}) == 1.0
