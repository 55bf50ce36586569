"""Programs of passes: what the driver does with any of them, methods of a few lines among them."""

import contextlib
import math
import weakref

import pytest
import torch
from torch import nn

from composer_sassha import SASSHA, SharpnessAwareOptimizer
from composer_sassha.common.tensors import unflatten
from composer_sassha.curvature import LazyCurvature
from composer_sassha.optim.counters import COUNTERS
from composer_sassha.optim.parameters import ParameterView
from composer_sassha.perturbations import (
    ASAMPerturbation,
    Ascent,
    Descent,
    Displacement,
    ESAMPerturbation,
    GSAMPerturbation,
    LookSAMPerturbation,
    MSAMPerturbation,
    Perturbation,
    SAMPerturbation,
    SSAMPerturbation,
    USAMPerturbation,
)
from tests.helpers import Injected, assert_same, copied

RHO = 0.3


def net(dtype=torch.float64):
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2)).to(dtype)


def loss_of(model, sign=1.0):
    generator = torch.Generator().manual_seed(9)
    x = torch.randn(6, 4, generator=generator, dtype=torch.float64)
    y = torch.randint(2, (6,), generator=generator)
    return sign * nn.functional.cross_entropy(model(x.to(next(model.parameters()).dtype)), y)


def wrapped(model, perturbation, interval=1, **settings):
    base = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, **settings)
    return SharpnessAwareOptimizer(base, perturbation, interval, model=model)


def train(model, optimizer, steps, sign=1.0):
    for _ in range(steps):

        def closure():
            optimizer.zero_grad()
            loss = loss_of(model, sign)
            optimizer.backward(loss)
            return loss

        optimizer.step(closure)
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def by_hand(update_of, steps):
    """SGD with momentum on the flat weights, with the update that `update_of(gradient at, w)` returns."""
    model = net()
    params = list(model.parameters())
    w = nn.utils.parameters_to_vector(params).detach()

    def gradient(at):
        nn.utils.vector_to_parameters(at, params)
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss_of(model), params)])

    momentum = 0
    for _ in range(steps):
        momentum = 0.9 * momentum + update_of(gradient, w)
        w = w - 0.1 * momentum
    return w


class MultiStep(Perturbation):
    """Three ascents, each a third of rho further along the gradient there."""

    def step(self, at):
        params = at.params
        e = torch.zeros(sum(p.numel() for p in params), dtype=torch.float64)
        for _ in range(3):
            g = yield Ascent(Displacement(params, unflatten(e, params)))
            e = e + (RHO / 3) * g.flat / g.flat.norm()
        yield Descent(Displacement(params, unflatten(e, params)))
        return None


def multi_step(gradient, w):
    e = torch.zeros_like(w)
    for _ in range(3):
        g = gradient(w + e)
        e = e + (RHO / 3) * g / g.norm()
    return gradient(w + e)


class Friendly(Perturbation):
    """Along the gradient less its running mean (Li et al. 2024, arXiv 2403.12350, sigma 1, lambda 0.9)."""

    remembers = "friendly_m"

    def step(self, at):
        g = yield Ascent()
        m = at.memory["friendly_m"] = 0.9 * at.memory["friendly_m"] + 0.1 * g.flat
        d = g.flat - m
        yield Descent(Displacement(at.params, unflatten(d, at.params), RHO / d.norm().item()))
        return None


class FriendlyByHand:
    def __init__(self):
        self.m = 0

    def __call__(self, gradient, w):
        g = gradient(w)
        self.m = 0.9 * self.m + 0.1 * g
        d = g - self.m
        return gradient(w + RHO * d / d.norm())


class Weighted(Perturbation):
    """The sharpness-weighted mean of both gradients (Yue et al. 2023, arXiv 2305.15817)."""

    mixes = True

    def step(self, at):
        g = yield Ascent(keeps=True)
        h = yield Descent(at.towards(g, RHO))
        return 0.2 * g.flat + 0.8 * h.flat


def weighted(gradient, w):
    g = gradient(w)
    return 0.2 * g + 0.8 * gradient(w + RHO * g / g.norm())


@pytest.mark.parametrize(
    ("program", "equation"),
    [(MultiStep, lambda: multi_step), (Friendly, FriendlyByHand), (Weighted, lambda: weighted)],
)
def test_a_new_method_is_a_program_of_a_few_lines(program, equation):
    model = net()
    w = train(model, wrapped(model, program()), steps=40)
    torch.testing.assert_close(w, by_hand(equation(), steps=40), rtol=0, atol=1e-10)


EVERY = [
    SAMPerturbation(0.1),
    SAMPerturbation(0.01, p=math.inf),
    ASAMPerturbation(0.3),
    ESAMPerturbation(0.1),
    GSAMPerturbation(0.1, 0.05, 0.2),
    LookSAMPerturbation(0.1, 0.5),
    MSAMPerturbation(0.1),
    SSAMPerturbation(0.1),
    USAMPerturbation(0.1),
    USAMPerturbation(0.1, renormalize=True),
]


@pytest.mark.parametrize("perturbation", EVERY, ids=repr)
def test_maximizing_the_negative_is_minimizing(perturbation):
    ends = []
    for maximize in (False, True):
        model = net()
        optimizer = wrapped(model, perturbation, interval=2, maximize=maximize)
        ends.append(train(model, optimizer, 5, sign=-1.0 if maximize else 1.0))
    assert_same(*ends)


def test_groups_are_maximized_each_by_itself():
    w, v = (nn.Parameter(torch.tensor([1.0], dtype=torch.float64)) for _ in range(2))
    groups = [{"params": [w]}, {"params": [v], "maximize": True}]
    optimizer = SharpnessAwareOptimizer(torch.optim.SGD(groups, lr=0.1), SAMPerturbation(rho=0.5))

    def closure():
        optimizer.zero_grad()
        loss = (w**2).sum() - (v**2).sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    e = 0.5 / math.sqrt(2)
    assert w.item() == v.item() == pytest.approx(1 - 0.1 * 2 * (1 + e))


@pytest.mark.parametrize("number", [1, 2, 3, 4])
@pytest.mark.parametrize("overflows", [False, True])
def test_a_program_that_is_cut_short_leaves_w(number, overflows):
    model, calls = net(), []
    optimizer = wrapped(model, MultiStep())
    train(model, optimizer, 1)
    before = copied([model.state_dict(), optimizer.state_dict()])

    def closure():
        optimizer.zero_grad()
        loss = loss_of(model)
        loss.backward()
        calls.append(0)
        if len(calls) == number:
            if overflows:
                return None
            raise Injected
        return loss

    if overflows:
        with pytest.warns(UserWarning, match="the closure returned None"):
            assert optimizer.step(closure) is None
    else:
        with pytest.raises(Injected):
            optimizer.step(closure)
    assert len(calls) == number and optimizer.phase is None
    assert_same(before, copied([model.state_dict(), optimizer.state_dict()]))


def test_the_hessian_is_that_of_the_descent_alone():
    w = nn.Parameter(torch.tensor([1.0], dtype=torch.float64))
    base = SASSHA([w], lr=0.1, betas=(0.9, 0.0))
    optimizer = SharpnessAwareOptimizer(base, MultiStep(), curvature=LazyCurvature())

    def closure():
        optimizer.zero_grad()
        loss = (w**3).sum()
        optimizer.backward(loss)
        return loss

    optimizer.step(closure)
    assert optimizer.state[w]["exp_hessian"].item() == pytest.approx(6 * (1 + RHO), rel=1e-12)


def test_msam_in_bfloat16_with_an_unused_parameter():
    model = net(torch.bfloat16)
    unused = nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    base = torch.optim.SGD([unused, *model.parameters()], lr=0.1, momentum=0.9)
    optimizer = SharpnessAwareOptimizer(base, MSAMPerturbation(1.0), model=model)
    train(model, optimizer, 3)
    assert torch.equal(unused, torch.ones(3, dtype=torch.bfloat16))


def test_the_rounding_check_counts_the_momentum():
    model = net(torch.bfloat16)
    optimizer = wrapped(model, MSAMPerturbation(1e-6))
    train(model, optimizer, 1)
    with pytest.warns(UserWarning, match="lost in rounding"):
        train(model, optimizer, 1)


class KeepsItsInput(torch.autograd.Function):
    """A loss whose node keeps the outputs, beyond its backward."""

    @staticmethod
    def forward(ctx, outputs):
        ctx.outputs = outputs
        return outputs.square().mean()

    @staticmethod
    def backward(ctx, grad):
        return grad * 2 * ctx.outputs / ctx.outputs.numel()


def test_the_first_outputs_are_gone_before_the_second_forward():
    model, seen, alive = net(), [], []
    optimizer = wrapped(model, SAMPerturbation(RHO))

    def closure():
        optimizer.zero_grad()
        alive.append([outputs() is not None for outputs in seen])
        outputs = model(torch.ones(2, 4, dtype=torch.float64))
        seen.append(weakref.ref(outputs))
        loss = KeepsItsInput.apply(outputs)
        optimizer.backward(loss)
        return loss

    assert isinstance(optimizer.step(closure), torch.Tensor)
    assert alive == [[], [False]]


class Yields(Perturbation):
    """A program of these passes, which returns this update."""

    def __init__(self, *passes, update=None, mixes=False):
        self.passes, self.update, self.mixes = passes, update, mixes

    def step(self, at):
        for each in self.passes:
            gradient = yield each
            del gradient
        return self.update


class NoGenerator(Perturbation):
    def step(self, at):
        return [Descent()]


WRONG = {
    "no generator": (NoGenerator(), "must be a generator that yields passes"),
    "no pass": (Yields(), "ended without a Descent"),
    "None": (Yields(None), "yielded None; it must yield an Ascent or a Descent"),
    "an ascent at the end": (Yields(Ascent()), "ended without a Descent"),
    "two descents": (Yields(Descent(), Descent()), "yielded a pass after its Descent"),
    "an ascent after": (Yields(Descent(), Ascent()), "yielded a pass after its Descent"),
    "an update that is not averaged": (
        Yields(Ascent(), Descent(), update=torch.zeros(58)),
        "set mixes = True in its class",
    ),
    "an update of another size": (
        Yields(Ascent(), Descent(), update=torch.zeros(3), mixes=True),
        r"has shape \(3,\); it must be \(58,\)",
    ),
}


@pytest.mark.parametrize(("perturbation", "message"), WRONG.values(), ids=WRONG)
def test_a_wrong_program_is_named_in_one_line_and_changes_nothing(perturbation, message):
    model = net()
    optimizer = wrapped(model, perturbation)
    before = copied([model.state_dict(), optimizer.state_dict()])
    with pytest.raises((TypeError, RuntimeError, ValueError), match=message) as error:
        train(model, optimizer, 1)
    assert "\n" not in str(error.value)
    assert_same(before, copied([model.state_dict(), optimizer.state_dict()]))


def test_a_vector_to_remember_of_another_size_is_refused_before_the_step():
    class Remembers(Perturbation):
        remembers = "kept"

        def step(self, at):
            yield Descent()
            at.memory["kept"] = torch.zeros(3)
            return None

    model = net()
    optimizer = wrapped(model, Remembers())
    before = copied(model.state_dict())
    with pytest.raises(ValueError, match=r"the vector kept .* has shape \(3,\); it must be \(58,\)"):
        train(model, optimizer, 1)
    assert_same(before, model.state_dict())


@pytest.mark.parametrize("perturbation", [GSAMPerturbation(0.1), LookSAMPerturbation(0.1)], ids=repr)
def test_the_flat_update_is_gone_when_the_base_optimizer_steps(perturbation, monkeypatch):
    model = net()
    optimizer = wrapped(model, perturbation)
    updates, alive = [], []
    set_gradient = ParameterView.set_gradient

    def watched(self, update, *args, **kwargs):
        updates.append(weakref.ref(update))
        set_gradient(self, update, *args, **kwargs)

    monkeypatch.setattr(ParameterView, "set_gradient", watched)
    optimizer.register_step_pre_hook(lambda *_: alive.append(updates[-1]() is not None))
    train(model, optimizer, 2)
    assert alive == [False, False]


def test_groups_that_were_replaced_get_their_counters():
    model = net()
    optimizer = wrapped(model, SAMPerturbation(0.1))
    optimizer.param_groups = [
        {key: value for key, value in group.items() if key not in COUNTERS}
        for group in optimizer.param_groups
    ]
    train(model, optimizer, 2)
    assert optimizer.steps_taken == 2


def test_another_curvature_looks_at_the_loss_again():
    w = nn.Parameter(torch.tensor([1.0, 2.0], dtype=torch.float64))
    optimizer = SharpnessAwareOptimizer(SASSHA([w], lr=0.1), curvature=LazyCurvature(1))

    def closure():
        optimizer.zero_grad()
        loss = w.relu().square().sum()
        again = lambda count: contextlib.nullcontext(w.relu().square().sum())  # noqa: E731
        optimizer.backward(loss, size=1, again=again)
        return loss

    optimizer.step(closure)
    optimizer.set_curvature(LazyCurvature(1, "finite_difference"))
    with pytest.warns(UserWarning, match="this loss has kinks"):
        optimizer.step(closure)
