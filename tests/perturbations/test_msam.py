"""MSAM's displacement, and what it can work around."""

import pytest
import torch
from composer.optim import DecoupledAdamW, DecoupledSGDW

from composer_sassha.optim import SASSHA, AdaHessian, Sophia
from composer_sassha.perturbations import MSAMPerturbation
from tests.helpers import assert_same, copied
from tests.perturbations.points import DTYPES, assert_displaces, displace, norm, tensors


@pytest.mark.parametrize("dtypes", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("entry", ["momentum_buffer", "exp_avg"])
def test_displaces_by_rho_against_the_momentum_of_all_parameters_together(dtypes, entry):
    momenta = tensors(3, dtypes)
    kept = [m.clone() for m in momenta]
    metrics = assert_displaces(
        MSAMPerturbation(rho=0.7),
        lambda w, g: [-0.7 * m.double() / norm(momenta) for m in momenta],
        dtypes,
        states=[{"step": 1, entry: m} for m in momenta],
    )
    assert metrics == {"rho": 0.7, "momentum_norm": pytest.approx(norm(momenta), rel=1e-6)}
    assert_same(momenta, kept)  # it is the optimizer's


@pytest.mark.parametrize("state", [{}, {"momentum_buffer": None}])
def test_without_momentum_yet_nothing_moves(state):
    params = tensors(1)
    metrics = displace(MSAMPerturbation(rho=0.7), params, states=[state] * 4)
    assert_same(params, tensors(1))
    assert metrics == {"rho": 0.7, "momentum_norm": 0.0}


def test_parameters_without_momentum_stay_and_do_not_count():
    params = [torch.zeros(2), torch.zeros(1), torch.zeros(1), torch.zeros(1)]
    some = {"momentum_buffer": torch.tensor([3.0, 0.0])}, {"momentum_buffer": torch.tensor([4.0])}
    metrics = displace(
        MSAMPerturbation(rho=0.5), params, states=[some[0], {}, some[1], {"momentum_buffer": None}]
    )
    expected = [[-0.3, 0.0], [0.0], [-0.4], [0.0]]
    for p, value in zip(params, expected, strict=True):
        torch.testing.assert_close(p, torch.tensor(value))
    assert metrics["momentum_norm"] == 5.0


def test_a_state_without_momentum_is_named():
    with pytest.raises(
        RuntimeError, match="MSAM: the optimizer keeps no exp_avg or momentum_buffer, but step, sum"
    ):
        displace(MSAMPerturbation(), [torch.ones(1)], states=[{"step": 1, "sum": torch.ones(1)}])


@pytest.mark.parametrize(
    ("optimizer", "arguments"),
    [
        (torch.optim.SGD, {}),
        (torch.optim.SGD, {"momentum": 0.0}),
        (torch.optim.Adagrad, {}),
        (torch.optim.RMSprop, {}),
        (torch.optim.Adadelta, {}),
        (torch.optim.Rprop, {}),
        (torch.optim.Adafactor, {}),
        (DecoupledSGDW, {}),
    ],
)
def test_an_optimizer_without_momentum_is_refused_by_name(optimizer, arguments):
    with pytest.raises(ValueError) as error:
        MSAMPerturbation().check(optimizer([torch.nn.Parameter(torch.ones(1))], lr=0.1, **arguments))
    assert str(error.value).startswith(f"MSAM: {optimizer.__name__} keeps no momentum")
    assert "\n" not in str(error.value)


def test_one_group_without_momentum_is_enough_to_refuse_unless_it_is_frozen():
    with_momentum, without = (torch.nn.Parameter(torch.ones(1)) for _ in range(2))
    groups = [{"params": [with_momentum], "momentum": 0.9}, {"params": [without]}]
    with pytest.raises(ValueError, match="MSAM: SGD keeps no momentum"):
        MSAMPerturbation().check(torch.optim.SGD(groups, lr=0.1))
    without.requires_grad_(False)
    MSAMPerturbation().check(torch.optim.SGD(groups, lr=0.1))


class Odd(torch.optim.Optimizer):
    """Keeps a momentum under `name`, whatever its groups say, and much else of its own."""

    def __init__(self, model, /, name, **settings):
        super().__init__([*model.parameters()], settings)
        self.name, self.steps, self.log, self.total = name, 0, [], torch.zeros(())
        self.state["global"] = {"k": torch.tensor(0)}

    @torch.no_grad()
    def step(self, closure=None):
        self.steps += 1
        self.log.append(self.steps)
        self.total += torch.rand(())
        self.state["global"]["k"] += 1
        for p in self.param_groups[0]["params"]:
            if p.grad is not None:
                self.state[p].setdefault(self.name, torch.zeros_like(p)).lerp_(p.grad, 0.1)
                p -= 0.1 * self.state[p][self.name]


@pytest.mark.parametrize(
    ("name", "settings", "keeps"),
    [
        ("exp_avg", {"beta1": 0.9}, True),
        ("momentum_buffer", {}, True),
        ("m", {"momentum": 0.9}, False),
        ("exp_avg_sq", {"betas": (0.9, 0.99)}, False),
    ],
)
def test_what_an_odd_optimizer_keeps_is_found_without_a_trace(name, settings, keeps):
    model = torch.nn.Linear(3, 2)
    base = Odd(model, name=name, **settings)
    base.register_step_pre_hook(lambda *_: pytest.fail("a hook has run"))
    before = copied([base.state_dict(), model.state_dict(), base.log, base.total, torch.get_rng_state()])
    if keeps:
        MSAMPerturbation().check(base)
    else:
        with pytest.raises(ValueError, match="MSAM: Odd keeps no momentum") as error:
            MSAMPerturbation().check(base)
        assert "\n" not in str(error.value)
    now = [base.state_dict(), model.state_dict(), base.log, base.total, torch.get_rng_state()]
    assert_same(before, copied(now))
    assert base.steps == 0 and {*base.state} == {"global"}


class Inner(torch.optim.SGD):
    """Hands its steps to another optimizer of the same parameters."""

    def __init__(self, params):
        params = [*params]
        super().__init__(params, lr=0.1)
        self.optimizers = [torch.optim.SGD(params, lr=0.1)]

    def step(self, closure=None):
        self.optimizers[0].step()


def test_a_momentum_that_cannot_be_looked_for_is_no_reason_to_refuse():
    p = torch.nn.Parameter(torch.ones(1))
    p.grad = torch.ones(1)
    MSAMPerturbation().check(Inner([p]))
    assert p.item() == 1


@pytest.mark.parametrize(
    ("optimizer", "arguments"),
    [
        (torch.optim.SGD, {"momentum": 0.9}),
        (torch.optim.RMSprop, {"momentum": 0.9}),
        (torch.optim.Adam, {}),
        (torch.optim.AdamW, {"amsgrad": True}),
        (torch.optim.NAdam, {}),
        (torch.optim.Adamax, {}),
        (torch.optim.AdamW, {"fused": True}),
        (DecoupledAdamW, {}),
        (SASSHA, {}),
        (AdaHessian, {}),
        (Sophia, {}),
    ],
)
def test_an_optimizer_that_passes_keeps_what_is_perturbed_along(optimizer, arguments):
    p = torch.nn.Parameter(torch.ones(1))
    base = optimizer([p], lr=0.1, **arguments)
    MSAMPerturbation().check(base)
    p.grad = torch.ones(1)
    if hasattr(base, "update_curvature"):
        base.update_curvature({p: torch.ones(1)})
    base.step()
    before = p.detach().clone()
    with torch.no_grad():
        displace(MSAMPerturbation(rho=0.5), [p], states=[base.state[p]])
    torch.testing.assert_close(p.detach(), before - 0.5)
