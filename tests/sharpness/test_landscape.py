"""Landscapes: directions, places, and nothing left behind."""

import numpy as np
import pytest
import torch
from torch import nn

from composer_sassha.sharpness import (
    Objective,
    filter_normalized,
    interpolation,
    line,
    objective_of,
    plane,
    undisturbed,
)
from tests.helpers import assert_same, copied, images, network
from tests.sharpness.problems import quadratic, symmetric


def convolution() -> tuple[nn.Module, Objective]:
    torch.manual_seed(3)
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(27, 2)).double()
    x = torch.randn(4, 2, 5, 5, dtype=torch.float64)
    return model.eval(), Objective(
        dict(model.named_parameters()), lambda x: model(x).square().mean(), [(x, 4)]
    )


def test_every_filter_of_the_direction_is_as_long_as_that_of_the_weights():
    model, objective = convolution()
    parts = dict(zip(objective.names, objective.like(filter_normalized(objective, seed=1)), strict=True))
    for name in ("0.weight", "3.weight"):
        lengths = model.get_parameter(name).detach().flatten(1).norm(dim=1)
        assert torch.allclose(parts[name].flatten(1).norm(dim=1), lengths, rtol=1e-12)
    for name in ("0.bias", "1.weight", "1.bias", "3.bias"):
        assert not parts[name].any()
    assert not torch.equal(filter_normalized(objective, 1), filter_normalized(objective, 2))
    assert torch.equal(filter_normalized(objective, 1), filter_normalized(objective, 1))


def test_a_scaled_filter_before_batch_norm_has_the_same_landscape():
    model, objective = convolution()
    model.train()[1].track_running_stats = False  # batch statistics
    model[1].eps = 0.0
    at = [-1.0, -0.4, 0.0, 0.7]
    before = line(objective, filter_normalized(objective), at)
    with torch.no_grad():
        model[0].weight.mul_(torch.tensor([2.0, 10.0, 0.3]).view(3, 1, 1, 1))
        model[0].bias.zero_()
    assert line(objective, filter_normalized(objective), at) == pytest.approx(before, rel=1e-9)


def test_lines_and_planes_are_those_of_a_quadratic():
    matrix = symmetric([1.0, 2.0, 5.0])
    w, d, f = torch.randn(3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).unbind()
    objective = quadratic(matrix, w)
    at, across = [-1.0, 0.0, 0.5], [-2.0, 0.0]

    def value(a, b):
        p = w + a * d + b * f
        return (p @ matrix @ p / 2).item()

    exact = np.array([[value(a, b) for a in at] for b in across])
    assert plane(objective, d, f, at, across) == pytest.approx(exact, rel=1e-12)
    assert line(objective, d, at) == pytest.approx(exact[1], rel=1e-12)
    assert torch.equal(objective.params[0], w)


def test_interpolation_ends_at_both_runs_statistics_included():
    x, y = images().tensors
    models = []
    for seed in (0, 1):
        model = network(dropout=0.2)
        torch.manual_seed(seed)
        for p in model.parameters():
            nn.init.normal_(p, std=0.3)
        model.train()(((x + seed), y))  # moves the running statistics
        models.append(model)
    with undisturbed(models[1]):
        end = objective_of(models[1], [((x, y), 40)]).loss()
    first = models[0]
    before = copied(first.state_dict())
    with undisturbed(first):
        objective = objective_of(first, [((x, y), 40)])
        begin = objective.loss()
        found = interpolation(objective, first, models[1].state_dict(), [0.0, 0.5, 1.0])
    assert found[[0, 2]] == pytest.approx([begin, end], rel=1e-6)
    assert_same(before, copied(first.state_dict()))

    middle = network()
    middle.load_state_dict(
        {
            name: (t + models[1].state_dict()[name]) / 2 if t.is_floating_point() else t
            for name, t in first.state_dict().items()
        }
    )
    with undisturbed(middle):
        assert found[1] == pytest.approx(objective_of(middle, [((x, y), 40)]).loss(), rel=1e-6)


def test_the_weights_come_back_after_an_exception():
    model, objective = convolution()
    before = copied(model.state_dict())
    objective.tick = iter([None, None]).__next__  # the third evaluation fails
    direction = filter_normalized(objective)
    with pytest.raises(StopIteration):
        line(objective, direction, [0.1, 0.2, 0.3])
    objective.tick = iter([None, None]).__next__
    end = {name: t + 1 for name, t in model.state_dict().items()}
    with pytest.raises(StopIteration):
        interpolation(objective, model, end, [0.1, 0.2, 0.3])
    assert_same(before, copied(model.state_dict()))
