"""The wrapper around perturbations that need more than a gradient: names, momentum, both gradients."""

import copy
import pickle

import pytest
import torch
from torch import nn

from composer_sassha import SharpnessAwareOptimizer
from composer_sassha.perturbations import (
    ASAMPerturbation,
    ESAMPerturbation,
    GSAMPerturbation,
    LookSAMPerturbation,
    MSAMPerturbation,
    SAMPerturbation,
    SSAMPerturbation,
)
from tests.helpers import Injected, assert_same, copied


def net():
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Tanh(), nn.Linear(8, 2))


def sgd(model, momentum=0.9):
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=momentum)


def closure_of(model, optimizer, at_pass=lambda: None):
    generator = torch.Generator().manual_seed(9)
    x, y = torch.randn(6, 4, generator=generator), torch.randint(2, (6,), generator=generator)

    def closure():
        at_pass()
        optimizer.zero_grad()
        dtype = next(model.parameters()).dtype
        loss = nn.functional.cross_entropy(model(x.to(dtype)), y)
        loss.backward()
        return loss

    return closure


def test_asam_takes_names_from_the_argument_or_the_model():
    ends = []
    for how in ("argument", "model"):
        model = net()
        given = {"named_parameters": model.named_parameters()} if how == "argument" else {"model": model}
        optimizer = SharpnessAwareOptimizer(sgd(model), ASAMPerturbation(rho=0.5), **given)
        for _ in range(3):
            optimizer.step(closure_of(model, optimizer))
        ends.append(copied(model.state_dict()))
    assert_same(*ends)


def test_asam_without_names_says_what_to_do_and_changes_nothing():
    model = net()
    optimizer = SharpnessAwareOptimizer(sgd(model), ASAMPerturbation())
    before = copied(model.state_dict())
    with pytest.raises(RuntimeError, match=r"named_parameters=model.named_parameters\(\)"):
        optimizer.step(closure_of(model, optimizer))
    assert_same(before, model.state_dict())


def test_msam_displaces_inside_its_only_pass():
    model = net()
    optimizer = SharpnessAwareOptimizer(sgd(model), MSAMPerturbation(rho=0.7))
    seen = []
    closure = closure_of(model, optimizer, lambda: seen.append(copied([*model.parameters()])))
    for step in range(3):
        w = copied([*model.parameters()])
        momenta = [optimizer.state.get(p, {}).get("momentum_buffer") for p in model.parameters()]
        momenta = copied(momenta)
        optimizer.step(closure)
        assert len(seen) == step + 1
        moved = torch.cat([(at - p).flatten() for at, p in zip(seen[-1], w, strict=True)])
        if step == 0:
            assert not moved.any()
            continue
        m = torch.cat([momentum.flatten() for momentum in momenta])
        torch.testing.assert_close(moved, -0.7 * m / m.norm(), rtol=1e-4, atol=1e-6)
        # The update starts from exactly w.
        expected = [
            p - 0.1 * optimizer.state[q]["momentum_buffer"]
            for p, q in zip(w, model.parameters(), strict=True)
        ]
        torch.testing.assert_close(expected, [p.detach() for p in model.parameters()], rtol=0, atol=1e-7)


@pytest.mark.parametrize("perturbation", [SAMPerturbation(), MSAMPerturbation(), GSAMPerturbation()])
def test_the_phase_tells_which_pass_runs(perturbation):
    model = net()
    optimizer = SharpnessAwareOptimizer(sgd(model), perturbation, interval=2)
    phases = []
    closure = closure_of(model, optimizer, lambda: phases.append(optimizer.phase))
    two = ["ascent", "descent"] if perturbation.ascends else [None]
    optimizer.step(closure)
    optimizer.step(closure)
    assert phases == [*two, None] and optimizer.phase is None

    def fail():
        raise Injected

    with pytest.raises(Injected):
        optimizer.step(closure_of(model, optimizer, fail))
    assert optimizer.phase is None


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_the_step_that_makes_the_state_makes_looksams_and_changes_nothing(momentum):
    model = net()
    optimizer = SharpnessAwareOptimizer(sgd(model, momentum), LookSAMPerturbation())
    before = copied(model.state_dict())
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    assert_same(before, model.state_dict())
    assert all(not optimizer.state[p]["looksam_g_v"].any() for p in model.parameters())


def test_adamw_meets_looksams_entry_only_after_its_own():
    model = net()
    optimizer = SharpnessAwareOptimizer(
        torch.optim.AdamW(model.parameters(), lr=0.01), LookSAMPerturbation(), interval=2
    )
    for _ in range(4):
        optimizer.step(closure_of(model, optimizer))
    assert all({"exp_avg", "looksam_g_v"} <= set(optimizer.state[p]) for p in model.parameters())


def test_a_skipped_step_leaves_what_is_remembered():
    model = net()
    optimizer = SharpnessAwareOptimizer(sgd(model), LookSAMPerturbation(), interval=1)
    optimizer.step(closure_of(model, optimizer))
    before = copied([model.state_dict(), optimizer.state_dict()])
    passes = 0

    def overflows():
        nonlocal passes
        passes += 1
        closure_of(model, optimizer)()
        return None if passes == 2 else 1.0

    with pytest.warns(UserWarning, match="overflowed"):
        assert optimizer.step(overflows) is None
    assert_same(before, [model.state_dict(), optimizer.state_dict()])


def test_a_failure_to_make_room_for_what_is_remembered_leaves_the_step_undone(monkeypatch):
    model = net()
    optimizer = SharpnessAwareOptimizer(sgd(model), LookSAMPerturbation())
    closure = closure_of(model, optimizer)
    before = copied(model.state_dict())

    def no_memory(*_, **__):
        raise RuntimeError("CUDA out of memory")

    with monkeypatch.context() as patched:
        patched.setattr(torch, "zeros_like", no_memory)
        with pytest.raises(RuntimeError, match="out of memory"):
            optimizer.step(closure)
    assert_same(before, model.state_dict())
    assert not optimizer.state and optimizer.steps_taken == 0
    optimizer.step(closure)
    assert all(optimizer.state[p]["looksam_g_v"].any() for p in model.parameters())


def test_loading_a_state_makes_no_entry_that_the_base_would_trip_over():
    # Gradients are there, but the base has not made its own state yet.
    model = net()
    optimizer = SharpnessAwareOptimizer(torch.optim.AdamW(model.parameters()), LookSAMPerturbation())
    closure = closure_of(model, optimizer)
    closure()
    optimizer.load_state_dict(optimizer.state_dict())
    optimizer.step(closure)
    assert all("exp_avg" in optimizer.state[p] for p in model.parameters())


def test_a_closure_may_return_the_same_tensor_every_time():
    model = net()
    optimizer = SharpnessAwareOptimizer(sgd(model), SAMPerturbation(rho=0.5))
    inner, static = closure_of(model, optimizer), torch.zeros(())

    def closure():
        return static.copy_(inner().detach())

    plain = net()
    expected = closure_of(plain, sgd(plain))().detach()
    assert_same(expected, optimizer.step(closure))
    assert optimizer.metrics["loss_gap"] > 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("rho", [1e-4, 5.0])
def test_a_displacement_that_rounding_swallows_is_said_once(dtype, rho, recwarn):
    model = net().to(dtype)
    optimizer = SharpnessAwareOptimizer(sgd(model), SAMPerturbation(rho))
    for _ in range(2):
        optimizer.step(closure_of(model, optimizer))
    said = [str(w.message) for w in recwarn if "lost in rounding" in str(w.message)]
    assert len(said) == (dtype == torch.bfloat16 and rho < 1)


@pytest.mark.parametrize(
    ("perturbation", "lost"),
    [
        (MSAMPerturbation(5.0), False),
        (MSAMPerturbation(1e-5), True),  # only once there is a momentum
        (ESAMPerturbation(5.0, beta=0.3), False),  # what it masks is not lost
        (ESAMPerturbation(1e-4, beta=0.3), True),
    ],
    ids=repr,
)
def test_only_what_is_meant_to_move_can_be_lost(perturbation, lost, recwarn):
    torch.manual_seed(3)
    model = nn.Sequential(nn.Embedding(50, 8), nn.Flatten(), nn.Linear(32, 2)).to(torch.bfloat16)
    optimizer = SharpnessAwareOptimizer(sgd(model), perturbation)

    def closure():
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(torch.arange(4)[None]), torch.tensor([1]))
        loss.backward()
        return loss

    for _ in range(3):
        optimizer.step(closure)
    assert sum("lost in rounding" in str(w.message) for w in recwarn) == lost


@pytest.mark.parametrize(
    "perturbation",
    [SAMPerturbation(), MSAMPerturbation(), GSAMPerturbation(), LookSAMPerturbation()],
    ids=repr,
)
def test_nothing_to_train_is_nothing_to_do(perturbation):
    model = net()
    optimizer = SharpnessAwareOptimizer(sgd(model), perturbation, interval=2)
    model.requires_grad_(False)
    for _ in range(2):
        assert optimizer.step(lambda: torch.ones(())) == 1


@pytest.mark.parametrize(
    "perturbation", [GSAMPerturbation(alpha=0.3), SSAMPerturbation(), LookSAMPerturbation()], ids=repr
)
class TestCombining:
    def test_mixed_dtypes_and_frozen_parameters(self, perturbation):
        model = net()
        model[0].requires_grad_(False)
        model[3].double()
        optimizer = SharpnessAwareOptimizer(sgd(model), perturbation, interval=2)
        before = copied(model.state_dict())

        def closure():
            optimizer.zero_grad()
            x = torch.ones(5, 4) * torch.arange(5.0)[:, None]
            hidden = model[2](model[1](model[0](x)))
            loss = model[3](hidden.double()).square().mean()
            loss.backward()
            return loss

        for _ in range(3):
            optimizer.step(closure)
        assert_same(before["0.weight"], model[0].weight.detach())
        assert not torch.equal(before["3.weight"], model[3].weight)
        assert model[0].weight.grad is None and model[3].weight.grad.dtype == torch.float64

    def test_channels_last_weights_get_gradients_of_their_layout(self, perturbation):
        ends = []
        for layout in (torch.contiguous_format, torch.channels_last):
            torch.manual_seed(0)
            model = nn.Conv2d(3, 4, 3).to(memory_format=layout).double()
            optimizer = SharpnessAwareOptimizer(sgd(model), perturbation, interval=2)

            def closure(model=model, optimizer=optimizer):
                optimizer.zero_grad()
                x = torch.linspace(-1, 1, 2 * 3 * 5 * 5, dtype=torch.float64).view(2, 3, 5, 5)
                loss = model(x).tanh().square().sum()
                loss.backward()
                return loss

            for _ in range(4):
                optimizer.step(closure)
            ends.append(model.weight.detach().contiguous())
        torch.testing.assert_close(*ends, rtol=1e-12, atol=1e-12)

    def test_the_gradient_at_w_is_kept_whatever_the_closure_does_with_it(self, perturbation):
        # Zeroed in place, or set to None.
        ends = []
        for set_to_none in (True, False):
            model = net()
            optimizer = SharpnessAwareOptimizer(sgd(model), perturbation)

            def closure(model=model, optimizer=optimizer, set_to_none=set_to_none):
                optimizer.zero_grad(set_to_none=set_to_none)
                loss = model(torch.ones(3, 4)).square().sum()
                loss.backward()
                return loss

            for _ in range(3):
                optimizer.step(closure)
            ends.append(copied(model.state_dict()))
        assert_same(*ends)

    def test_copies_go_on_alike(self, perturbation):
        model = net()
        optimizer = SharpnessAwareOptimizer(
            sgd(model), perturbation, interval=2, named_parameters=model.named_parameters()
        )
        optimizer.step(closure_of(model, optimizer))
        others = [copy.deepcopy((model, optimizer)), pickle.loads(pickle.dumps((model, optimizer)))]
        optimizer.step(closure_of(model, optimizer))
        for other_model, other in others:
            other.step(closure_of(other_model, other))
            assert_same(copied(model.state_dict()), copied(other_model.state_dict()))
            assert_same(optimizer.state_dict(), other.state_dict())
