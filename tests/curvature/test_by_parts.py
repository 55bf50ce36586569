"""Operations by parts: the kernel's value and gradient, and the derivative of that gradient."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

from composer_sassha import SharpnessAwareOptimizer
from composer_sassha.common.tensors import flatten
from composer_sassha.curvature import LazyCurvature, rademacher
from composer_sassha.curvature.by_parts import _REPLACEMENTS, differentiable_twice
from composer_sassha.perturbations import SAMPerturbation
from composer_sassha.sharpness.objective import Objective, undisturbed

WORDS, BAGS = torch.tensor([0, 1, 1, 2, 3, 5, 3]), torch.tensor([0, 3, 3])


def bag(**settings):
    return lambda w: F.embedding_bag(WORDS, w.view(8, 4), BAGS, **settings)


def bag_of_weights(w):
    return F.embedding_bag(WORDS, w.view(8, 4), BAGS, mode="sum", per_sample_weights=w[:7])


def grid(**settings):
    def sample(w):
        pixels, where = w[:16].view(1, 1, 4, 4), 1.3 * w[16:].view(1, 2, 4, 2).tanh()
        return F.grid_sample(pixels, where, align_corners=False, **settings)

    return sample


def normed(layer, name):
    return lambda w: torch.func.functional_call(layer, {name: w.view(4, 8)}, torch.ones(8).double())


def deprecated_weight_norm(w):
    with pytest.warns(FutureWarning):
        layer = nn.utils.weight_norm(nn.Linear(8, 4).double())
    with torch.no_grad():
        layer.weight_g.fill_(2)
    return normed(layer, "weight_v")(w) - layer.bias


OPERATIONS = {
    "hardsigmoid": lambda w: F.hardsigmoid(3 * w),
    "hardsigmoid in place": lambda w: F.hardsigmoid(3 * w, inplace=True) * w,
    "weight_norm": normed(
        parametrizations.weight_norm(nn.Linear(8, 4).double()), "parametrizations.weight.original1"
    ),
    "weight_norm, deprecated": deprecated_weight_norm,
    "cdist": lambda w: torch.cdist(w[:16].view(4, 4), w.view(2, 4, 4)),  # some pairs are equal
    "cdist of p=3": lambda w: torch.cdist(w.view(8, 4), torch.ones(5, 4).double(), p=3),
    "cdist of p=1": lambda w: torch.cdist(w.view(8, 4), torch.ones(5, 4).double(), p=1) ** 2,
    "pdist": lambda w: F.pdist(w.view(8, 4)),
    "embedding_bag": bag(),
    "embedding_bag of sums": bag(mode="sum"),
    "embedding_bag of maxima": bag(mode="max"),
    "embedding_bag with padding": bag(padding_idx=1),
    "embedding_bag with a last offset": bag(include_last_offset=True),
    "embedding_bag with weights": bag_of_weights,
    "embedding_bag in two dimensions": lambda w: F.embedding_bag(WORDS[:6].view(2, 3), w.view(8, 4)),
    "grid_sample": grid(),
    "grid_sample, border": grid(padding_mode="border"),
    "grid_sample, reflection, bicubic": grid(padding_mode="reflection", mode="bicubic"),
    "grid_sample, nearest": grid(mode="nearest"),
    "multi_margin_loss": lambda w: F.multi_margin_loss(w.view(8, 4), torch.arange(8) % 4, p=2),
}


def derivatives(function, w, z):
    """The value, the gradient of a nonlinear function of it, and the derivative of that along z."""
    w = w.clone().requires_grad_()
    value = function(w)
    (gradient,) = torch.autograd.grad((value**3).sum() + value.sum(), w, create_graph=z is not None)
    product = None if z is None else torch.autograd.grad(gradient, w, z)[0]
    return value.detach(), gradient.detach(), product


@pytest.mark.parametrize("name", OPERATIONS)
def test_an_operation_by_parts_is_the_kernel_and_has_its_second_derivative(name):
    torch.manual_seed(4)
    function, w = OPERATIONS[name], torch.randn(32, dtype=torch.float64)
    z = torch.randn(32, dtype=torch.float64)
    value, gradient, _ = derivatives(function, w, None)
    with differentiable_twice():
        found = derivatives(function, w, z)
    # torch's hardsigmoid computes its gradient with 1/6 in float32.
    tolerance = {"rtol": 1e-6 if "hardsigmoid" in name else 1e-12, "atol": 1e-13}
    torch.testing.assert_close(found[:2], (value, gradient), **tolerance)
    h = 1e-5
    above, below = (derivatives(function, w + sign * h * z, None)[1] for sign in (1, -1))
    torch.testing.assert_close(found[2], (above - below) / (2 * h), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_hardsigmoid_by_parts_keeps_a_dtype_and_its_precision(dtype):
    x = torch.linspace(-4, 4, 1001).to(dtype)
    expected = F.hardsigmoid(x)
    with differentiable_twice():
        found = F.hardsigmoid(x)
    assert found.dtype == dtype
    torch.testing.assert_close(found, expected, rtol=torch.finfo(dtype).eps, atol=0)


def kernels():
    return [getattr(owner, name) for owner, name, _ in _REPLACEMENTS]


def test_the_kernels_are_back_afterwards():
    before = kernels()
    with pytest.raises(ZeroDivisionError), differentiable_twice():
        assert not any(now == old for now, old in zip(kernels(), before, strict=True))
        raise ZeroDivisionError
    assert kernels() == before


@pytest.mark.parametrize("cell", [nn.LSTM, nn.GRU, nn.RNN])
def test_recurrent_layers_do_without_cudnn(cell, monkeypatch):
    # Its second derivative is missing; on a CPU only the switch can be seen.
    name = {nn.LSTM: "lstm", nn.GRU: "gru", nn.RNN: "rnn_tanh"}[cell]
    real, seen = getattr(torch._VF, name), []
    monkeypatch.setattr(
        torch._VF, name, lambda *a: seen.append(torch.backends.cudnn.enabled) or real(*a), raising=False
    )
    layer, x = cell(3, 2), torch.randn(4, 1, 3)
    expected = layer(x)[0]
    with differentiable_twice():
        assert torch.equal(layer(x)[0], expected)
    assert seen == [True, False] and torch.backends.cudnn.enabled


class Keeps(torch.optim.SGD):
    """An update rule that shows the estimate that it was given."""

    def update_curvature(self, diagonal):
        self.diagonal = diagonal


class Checkpointed(nn.Module):
    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        return checkpoint(self.net, x, use_reentrant=False)


@pytest.mark.parametrize("wrap", [lambda net: net, Checkpointed], ids=["plain", "checkpointed"])
def test_mobilenet_has_the_curvature_of_its_gradient(wrap):
    models = pytest.importorskip("torchvision").models
    torch.manual_seed(5)
    net = models.mobilenet_v3_small(num_classes=3, dropout=0.0).double()
    model, x, y = wrap(net), torch.randn(4, 3, 32, 32).double(), torch.tensor([0, 1, 2, 0])
    params = list(net.parameters())
    rule = Keeps(params, lr=0.0)
    optimizer = SharpnessAwareOptimizer(rule, SAMPerturbation(0.0), curvature=LazyCurvature(), model=model)

    def loss():
        return F.cross_entropy(model(x), y)

    def closure():
        optimizer.zero_grad()
        value = loss()
        optimizer.backward(value)
        return value

    optimizer.step(closure)
    z = rademacher(params, (0, 0, 0, 0, 0))

    def gradient(h):
        with torch.no_grad():
            torch._foreach_add_(params, z, alpha=h)
        found = torch.autograd.grad(loss(), params)
        with torch.no_grad():
            torch._foreach_add_(params, z, alpha=-h)
        return flatten(found, params)

    h = 1e-9  # below the distance to the next kink
    product = (gradient(h) - gradient(-h)) / (2 * h)
    estimate = flatten([rule.diagonal[p] for p in params], params) * flatten(z, params)
    assert (estimate - product).norm() < 1e-4 * product.norm()
    if wrap is not Checkpointed:
        objective = Objective(dict(net.named_parameters()), lambda _: loss(), [(None, 4)])
        with undisturbed(net, batch_statistics=True):
            measured = objective.product(flatten(z, params))
        assert (measured - estimate).norm() < 1e-10 * estimate.norm()
