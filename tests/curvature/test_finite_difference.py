"""The difference of two gradients against the full Hessian."""

import contextlib

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from composer_sassha.common.validate import SettingError
from composer_sassha.curvature import finite_difference_diagonal, rademacher
from composer_sassha.curvature.finite_difference import kinks, refuse_half_precision
from tests.curvature.problems import Problem, flat
from tests.helpers import Injected


def estimate(problem, keys):
    grads = torch.autograd.grad(problem.loss(), problem.params)

    def again():
        return contextlib.nullcontext(problem.loss())

    return flat(finite_difference_diagonal(grads, problem.params, keys, again))


def test_one_probe_is_z_times_hz_within_the_derived_error():
    problem = Problem()
    z = flat(rademacher(problem.params, (4, 2)))
    error = (estimate(problem, [(4, 2)]) - z * (problem.hessian() @ z)).abs()
    eps = torch.finfo(torch.float64).eps
    h = eps**0.5 / 10
    # Taylor: h / 2 times the third derivative, which over a distance of 1e-8 changes by less than its half.
    # Rounding: two gradients, each off by less than 100 eps of the largest entry, after a few dozen sums.
    truncation = 0.75 * h * problem.third_derivative(z).abs()
    rounding = 2 * 100 * eps * problem.gradient().abs().max() / h
    assert (error <= truncation + rounding).all()
    assert truncation.max() + rounding < 1e-4 * (problem.hessian() @ z).abs().max()


def test_several_samples_are_the_mean_of_single_ones_and_the_weights_are_back():
    problem = Problem()
    with torch.no_grad():
        problem.params[1].fill_(1e-20)  # (w + h z) - h z is 0
    before = flat(problem.params)
    keys = [(1, k) for k in range(3)]
    singles = torch.stack([estimate(problem, [key]) for key in keys]).mean(dim=0)
    torch.testing.assert_close(estimate(problem, keys), singles, rtol=1e-9, atol=1e-12)
    assert torch.equal(before, flat(problem.params))


@pytest.mark.parametrize("place", ["on entering", "inside", "differentiating"])
def test_an_exception_leaves_the_weights_as_they_were(place):
    problem = Problem()
    before = flat(problem.params)

    @contextlib.contextmanager
    def again():
        assert not torch.equal(before, flat(problem.params))
        if place == "on entering":
            raise Injected
        loss = problem.loss()
        if place == "inside":
            loss.register_hook(lambda _: (_ for _ in ()).throw(Injected))
        yield loss if place == "inside" else loss.detach()

    grads = torch.autograd.grad(problem.loss(), problem.params)
    with pytest.raises(RuntimeError):
        finite_difference_diagonal(grads, problem.params, [(0,)], again)
    assert torch.equal(before, flat(problem.params))


def test_half_precision_parameters_are_refused():
    w = nn.Parameter(torch.ones(2, dtype=torch.bfloat16))
    with pytest.raises(ValueError, match="needs parameters in float32 or float64"):
        finite_difference_diagonal([w.detach()], [w], [(0,)], lambda: contextlib.nullcontext((w**2).sum()))


def test_half_precision_inside_the_model_is_refused():
    w = nn.Parameter(torch.ones(2))
    with torch.autocast("cpu", torch.bfloat16):
        loss = F.linear(torch.ones(3, 2), w[None]).float().tanh().sum()
    with pytest.raises(SettingError, match=r"this one computes in torch.bfloat16 \(an autocast of its own"):
        refuse_half_precision(loss)
    refuse_half_precision(F.linear(torch.ones(3, 2), w[None]).sum())


@pytest.mark.parametrize(
    ("function", "name"),
    [
        (F.relu, "Relu"),
        (nn.PReLU(), "PreluKernel"),
        (F.leaky_relu, "LeakyRelu"),
        (F.relu6, "Hardtanh"),
        (F.hardswish, "Hardswish"),
        (F.hardsigmoid, "Hardsigmoid"),
        (lambda x: F.threshold(x, 0.1, 0.0), "Threshold"),
        (lambda x: F.max_pool2d(x[None], 2), "MaxPool2D"),
        (lambda x: F.adaptive_max_pool2d(x[None], 2), "AdaptiveMaxPool2D"),
        (torch.abs, "Abs"),
        (lambda x: x.clamp(min=0), "Clamp"),
        (lambda x: torch.maximum(x, -x), "Maximum"),
        (lambda x: torch.minimum(x, -x), "Minimum"),
        (lambda x: x.amax(dim=0), "Amax"),
        (lambda x: x.max(dim=0).values, "Max"),
    ],
)
def test_kinks_are_found(function, name):
    x = torch.randn(3, 4, 4, requires_grad=True)
    (found,) = kinks(function(x.tanh()).sum())
    assert found.startswith(name)


@pytest.mark.parametrize("function", [F.gelu, F.silu, torch.tanh, F.softplus, F.mish, torch.sigmoid])
def test_smooth_functions_have_none(function):
    x = torch.randn(3, 4, 4, requires_grad=True)
    pooled = F.avg_pool2d(F.layer_norm(function(x), (4,)), 2).logsumexp(dim=0)
    assert kinks(F.cross_entropy(pooled, torch.zeros(2, dtype=int))) == []
