"""The wrapper around optimizers and parameters of unusual make: it takes what the base optimizer takes."""

import copy
import io

import pytest
import torch
from torch import nn

from composer_sassha import SASSHA, AdaHessian, SharpnessAwareOptimizer, Sophia
from composer_sassha.curvature import LazyCurvature
from composer_sassha.perturbations import (
    GSAMPerturbation,
    LookSAMPerturbation,
    MSAMPerturbation,
    SAMPerturbation,
)
from tests.helpers import assert_same, copied


class Shapes(nn.Module):
    """Parameters of every layout; two branches take turns."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.conv = nn.Conv2d(2, 3, 2).to(memory_format=torch.channels_last)
        self.number = nn.Parameter(torch.tensor(0.5))
        self.empty = nn.Parameter(torch.empty(0, 3))
        self.turned = nn.Parameter(torch.randn(4, 3).T)
        self.branches = nn.ModuleList([nn.Linear(4, 2), nn.Linear(4, 2)])

    def forward(self, x, branch):
        hidden = torch.tanh(self.conv(x).mean((2, 3)) @ self.turned * self.number) + self.empty.sum()
        return self.branches[branch](hidden)


def train(model, optimizer, steps, **how):
    for t in steps:
        generator = torch.Generator().manual_seed(t)
        x, y = torch.randn(6, 2, 4, 4, generator=generator), torch.randint(2, (6,), generator=generator)

        def closure(x=x, y=y, t=t):
            optimizer.zero_grad(**how)
            loss = nn.functional.cross_entropy(model(x, t % 2), y)
            getattr(optimizer, "backward", torch.Tensor.backward)(loss)
            return loss

        if isinstance(optimizer, SharpnessAwareOptimizer):
            optimizer.step(closure)
        else:
            closure()
            optimizer.step()


class Counting(torch.optim.SGD):
    """Keeps state under strings: a tensor, as MADGRAD does, and a dict."""

    def __init__(self, params, **settings):
        super().__init__(params, momentum=0.9, **settings)
        self.state["k"] = torch.tensor(0)
        self.state["all"] = {"sum": torch.zeros(()), "by": {"group": [1, 2]}}

    def step(self, closure=None):
        self.state["k"] += 1
        self.state["all"]["sum"] += 1 / self.state["k"]
        for group in self.param_groups:
            group["lr"] = 0.1 / float(self.state["all"]["sum"])
        return super().step(closure)


class Hybrid(torch.optim.Optimizer):
    """Takes two lists, as Muon does; its groups have no common hyperparameter, and no lr."""

    def __init__(self, matrices, others, *, rate):
        matrices = {"params": matrices, "rate": rate, "momentum": 0.9}
        super().__init__([matrices, {"params": others, "rate": rate / 2}], {})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    average = self.state[p].setdefault("momentum_buffer", torch.zeros_like(p))
                    average.lerp_(p.grad, 1 - group.get("momentum", 0.5))
                    p -= group["rate"] * average / (average.norm() + 1)

    def zero_grad(self):
        for group in self.param_groups:
            for p in group["params"]:
                p.grad = None


class Nested(torch.optim.Optimizer):
    """Keeps a dict of momenta for each parameter, as AggMo does, and finds its rate itself."""

    def __init__(self, params):
        super().__init__(params, {"lr": None, "betas": [0.0, 0.5]})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    momenta = self.state[p].setdefault("momenta", {})
                    for beta in group["betas"]:
                        momentum = momenta.setdefault(beta, torch.zeros_like(p))
                        momentum.mul_(beta).add_(p.grad)
                        p -= 0.1 * momentum


def matrices_and_others(model):
    params = [*model.parameters()]
    return [p for p in params if p.ndim > 1], [p for p in params if p.ndim < 2]


def with_names(model):
    head, rest = [*model.named_parameters()][:2], [*model.named_parameters()][2:]
    return torch.optim.AdamW([{"params": head, "lr": 0.1}, {"params": rest}], lr=0.05)


BASES = {
    "string_keys": lambda model: Counting(model.parameters(), lr=0.1),
    "two_lists": lambda model: Hybrid(*matrices_and_others(model), rate=0.1),
    "nested_state": lambda model: Nested(model.parameters()),
    "names": with_names,
    "an_empty_group": lambda model: torch.optim.NAdam([{"params": []}, {"params": model.parameters()}]),
    "tensor_lr": lambda model: torch.optim.AdamW(model.parameters(), lr=torch.tensor(0.1), foreach=False),
    "fused": lambda model: torch.optim.AdamW(model.parameters(), lr=0.1, fused=True),
    "one_by_one": lambda model: torch.optim.Adamax(model.parameters(), lr=0.1, foreach=False),
    "factored": lambda model: torch.optim.Adafactor((p for p in model.parameters() if p.numel()), lr=0.1),
    "rprop": lambda model: torch.optim.Rprop(model.parameters(), lr=0.1),
    "asgd": lambda model: torch.optim.ASGD(model.parameters(), lr=0.1),
}
each_base = pytest.mark.parametrize("base", BASES.values(), ids=BASES)
AT_RADIUS_0 = {
    "sam": SAMPerturbation(0.0),
    "gsam": GSAMPerturbation(0.0, 0.0, alpha=0.0),
    "looksam": LookSAMPerturbation(0.0, alpha=0.0),
}


def outcome(model, optimizer):
    return copied([model.state_dict(), optimizer.state_dict()["state"]])


@each_base
def test_at_radius_0_every_base_is_itself_bit_for_bit(base):
    ends = []
    for perturbation in (None, SAMPerturbation(0.0)):
        model = Shapes()
        optimizer = base(model)
        if perturbation is not None:
            optimizer = SharpnessAwareOptimizer(optimizer, perturbation, model=model)
        train(model, optimizer, range(5))
        ends.append(outcome(model, optimizer))
    assert_same(*ends)


@each_base
def test_every_base_resumes_bit_for_bit_and_as_a_copy(base):
    model = Shapes()
    optimizer = SharpnessAwareOptimizer(base(model), SAMPerturbation(0.1), model=model)
    train(model, optimizer, range(3))
    saved = io.BytesIO()
    torch.save([model.state_dict(), optimizer.state_dict()], saved)
    saved.seek(0)
    weights, state = torch.load(saved, weights_only=False)
    resumed = Shapes()
    resumed.load_state_dict(weights)
    other = SharpnessAwareOptimizer(base(resumed), SAMPerturbation(0.1), model=resumed)
    other.load_state_dict(state)
    twin = copy.deepcopy(optimizer)
    for each in (optimizer, other, twin):
        train(each.model, each, range(3, 6))
        assert each.steps_taken == 6
    assert_same(outcome(model, optimizer), outcome(resumed, other))
    assert_same(outcome(model, optimizer), outcome(twin.model, twin))


@pytest.mark.parametrize("perturbation", AT_RADIUS_0.values(), ids=AT_RADIUS_0)
@pytest.mark.parametrize("zeroing", [{}, {"set_to_none": False}])
def test_a_gradient_that_is_zeroed_in_place_is_there_for_the_base(perturbation, zeroing):
    """The branch whose turn it is not has a gradient of zero then, and momentum moves it."""
    ends = []
    for wraps in (False, True):
        model = Shapes()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
        if wraps:
            optimizer = SharpnessAwareOptimizer(optimizer, perturbation, model=model)
        train(model, optimizer, range(5), **zeroing)
        ends.append(copied(model.state_dict()))
    assert_same(*ends)


@pytest.mark.filterwarnings("ignore:optimizer contains a parameter group with duplicate:UserWarning")
def test_a_parameter_that_is_twice_in_a_group_is_displaced_once():
    w = nn.Parameter(torch.tensor([1.0], dtype=torch.float64))
    optimizer = SharpnessAwareOptimizer(torch.optim.SGD([w, w], lr=0.1), SAMPerturbation(0.5))

    def closure():
        optimizer.zero_grad()
        loss = w.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    assert w.item() == pytest.approx(1 - 2 * 0.1 * 2 * 1.5)  # the base optimizer steps it twice


def test_a_caller_that_edits_nested_state_of_a_state_dict_edits_a_copy():
    model = Shapes()
    optimizer = SharpnessAwareOptimizer(Nested(model.parameters()), SAMPerturbation(0.1), model=model)
    train(model, optimizer, range(1))
    before = copied(optimizer.state_dict())
    for entry in optimizer.state_dict()["state"].values():
        entry["momenta"].clear()
    assert_same(before, optimizer.state_dict())


DTYPES = (torch.int8, torch.uint8, torch.bool, torch.float8_e4m3fn, torch.complex64, torch.bfloat16)
FROZEN = {
    **{str(dtype).removeprefix("torch."): torch.ones(5, 3).to(dtype) for dtype in DTYPES},
    "expanded": torch.ones(1).expand(5, 3),
    "empty": torch.empty(0, 3),
    "sparse": torch.eye(3).to_sparse(),
}
RULES = {
    "adamw": lambda groups: torch.optim.AdamW(groups, lr=0.1),
    "sassha": lambda groups: SASSHA(groups, lr=0.1),
    "adahessian": lambda groups: AdaHessian(groups, lr=0.1, block_size=2),
    "sophia": lambda groups: Sophia(groups, lr=0.1),
}


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
@pytest.mark.parametrize(
    "perturbation", [SAMPerturbation(0.1), LookSAMPerturbation(0.1), MSAMPerturbation(0.1)]
)
def test_frozen_parameters_of_any_kind_make_no_difference(rule, perturbation):
    ends = []
    for frozen in ([], [nn.Parameter(t.clone(), requires_grad=False) for t in FROZEN.values()]):
        model = Shapes()
        model.frozen = nn.ParameterList(frozen)
        base = rule([{"params": [p for p in model.parameters() if p.requires_grad]}, {"params": frozen}])
        curvature = LazyCurvature(2) if hasattr(base, "update_curvature") else None
        optimizer = SharpnessAwareOptimizer(base, perturbation, curvature=curvature, model=model)
        train(model, optimizer, range(4))
        optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        train(model, optimizer, range(4, 6))
        ends.append(copied([p.detach() for p in model.parameters() if p.requires_grad]))
        for p, value in zip(frozen, FROZEN.values(), strict=False):
            assert torch.equal(p.to_dense().cfloat(), value.to_dense().cfloat())
    assert_same(*ends)
