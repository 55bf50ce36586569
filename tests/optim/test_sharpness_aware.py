"""The wrapper in plain PyTorch: passes, intervals, restoration, shared state, the checkpoint format."""

import contextlib
import copy
import math
import pickle
import random
import warnings

import numpy as np
import pytest
import torch
from torch import nn

from composer_sassha import SASSHA, SharpnessAwareOptimizer
from composer_sassha.curvature import LazyCurvature
from composer_sassha.perturbations import SAMPerturbation
from tests.helpers import Injected, assert_same, copied, rng_states


def net():
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Dropout(0.3), nn.Linear(8, 2))


def batches(count):
    generator = torch.Generator().manual_seed(9)
    for _ in range(count):
        yield torch.randn(6, 4, generator=generator), torch.randint(2, (6,), generator=generator)


def train(model, optimizer, steps, *, backward=torch.Tensor.backward, hook=lambda: None):
    losses = []
    for x, y in batches(steps):

        def closure(x=x, y=y):
            hook()
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(x), y)
            backward(loss)
            return loss

        losses.append(optimizer.step(closure))
    return losses


def sgd(model):
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


BASES = {
    "sgd": sgd,
    "adamw": lambda model: torch.optim.AdamW(model.parameters(), lr=0.01),
    "rmsprop": lambda model: torch.optim.RMSprop(model.parameters(), lr=0.01),
    "adagrad": lambda model: torch.optim.Adagrad(model.parameters(), lr=0.01),
}


@pytest.mark.parametrize("base", BASES.values(), ids=BASES.keys())
def test_without_displacement_it_is_the_base_optimizer_bit_for_bit(base):
    # Two passes a step, and no trace of the second: not in weights, state, BatchNorm, RNG or the returned
    # loss.
    runs = []
    for rho in (None, 0.0):
        model = net()
        optimizer = base(model)
        if rho is not None:
            optimizer = SharpnessAwareOptimizer(optimizer, SAMPerturbation(rho), model=model)
        torch.manual_seed(0)
        losses = train(model, optimizer, 5)
        runs.append(copied([model.state_dict(), optimizer.state_dict()["state"], rng_states(), losses]))
    assert_same(runs[0], runs[1])


def test_sam_follows_its_equation():
    torch.manual_seed(0)
    a = torch.randn(5, 5, dtype=torch.float64)
    w = nn.Parameter(torch.randn(5, dtype=torch.float64))
    expected = w.detach().clone()
    optimizer = SharpnessAwareOptimizer(torch.optim.SGD([w], lr=0.01), SAMPerturbation(rho=0.3))

    def closure():
        optimizer.zero_grad()
        loss = torch.cos(a @ w).sum()
        loss.backward()
        return loss

    for _ in range(20):
        optimizer.step(closure)
        g = -a.T @ torch.sin(a @ expected)
        g_hat = -a.T @ torch.sin(a @ (expected + 0.3 * g / g.norm()))
        expected = expected - 0.01 * g_hat
        torch.testing.assert_close(w.detach(), expected, rtol=1e-12, atol=1e-12)


def test_passes_follow_the_interval_and_skipped_steps_do_not_count():
    model = net()
    optimizer = SharpnessAwareOptimizer(sgd(model), SAMPerturbation(), interval=3, model=model)
    passes = []
    outcomes = iter([1.0, 1.0, 1.0, None, 0.0, 1.0, 1.0, 1.0, 1.0])
    for _ in range(6):
        calls = 0

        def closure():
            nonlocal calls
            calls += 1
            for p in model.parameters():
                p.grad = torch.ones_like(p)
            return next(outcomes)

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            optimizer.step(closure)
        passes.append((calls, optimizer.steps_taken))
    # a step of two passes, one of one, a skipped one, a loss of 0.0 that is a loss, and the next perturbed
    # one
    assert passes == [(2, 1), (1, 2), (1, 2), (1, 3), (2, 4), (1, 5)]
    assert optimizer.skipped_steps == 1


@pytest.mark.parametrize("failing_pass", [1, 2])
def test_a_closure_that_returns_none_changes_nothing(failing_pass):
    model = net()
    optimizer = SharpnessAwareOptimizer(sgd(model), SAMPerturbation(0.5), model=model)
    train(model, optimizer, 2)
    before = copied([model.state_dict(), optimizer.state_dict(), rng_states()])
    calls = 0

    def closure():
        nonlocal calls
        calls += 1
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(torch.ones(6, 4)), torch.zeros(6, dtype=torch.long)).backward()
        return None if calls == failing_pass else 1.0

    with pytest.warns(UserWarning, match="closure returned None"):
        assert optimizer.step(closure) is None
    assert calls == failing_pass
    assert_same(before, copied([model.state_dict(), optimizer.state_dict(), rng_states()]))


@pytest.mark.parametrize("failing_call", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("exception", [Injected, KeyboardInterrupt])
def test_after_an_exception_the_step_can_be_tried_again(failing_call, exception):
    def run(fail_at):
        model = net()
        optimizer = SharpnessAwareOptimizer(
            SASSHA(model.parameters(), lr=0.05),
            SAMPerturbation(0.5),
            curvature=LazyCurvature(interval=2),
            model=model,
        )
        random.seed(0), np.random.seed(0), torch.manual_seed(0)  # noqa: NPY002
        calls = 0

        def draw():
            nonlocal calls
            calls += 1
            random.random(), np.random.rand()  # noqa: NPY002 - a closure may draw from every generator

        def fail(loss):
            optimizer.backward(loss)
            if calls == fail_at:
                raise exception

        for x, y in batches(4):

            def closure(x=x, y=y):
                draw()
                optimizer.zero_grad()
                loss = nn.functional.cross_entropy(model(x), y)
                fail(loss)
                return loss

            before = copied([model.state_dict(), optimizer.state_dict(), rng_states()])
            try:
                optimizer.step(closure)
            except exception:
                assert_same(before, copied([model.state_dict(), optimizer.state_dict(), rng_states()]))
                optimizer.step(closure)
        return copied([model.state_dict(), optimizer.state_dict(), rng_states()])

    assert_same(run(fail_at=None), run(fail_at=failing_call))


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_a_gradient_that_is_not_finite_displaces_by_nothing(bad):
    w = nn.Parameter(torch.tensor([1.0, 2.0]))
    optimizer = SharpnessAwareOptimizer(torch.optim.SGD([w], lr=0.5), SAMPerturbation(1.0))
    seen = []

    def closure():
        seen.append(w.tolist())
        w.grad = torch.tensor([bad, 1.0]) if len(seen) == 1 else torch.tensor([1.0, 1.0])
        return torch.tensor(1.0)

    with pytest.warns(UserWarning, match="the weights are not displaced on this step"):
        optimizer.step(closure)
    assert seen == [[1.0, 2.0], [1.0, 2.0]] and w.tolist() == [0.5, 1.5]


def test_complex_parameters_are_refused():
    w = nn.Parameter(torch.ones(2, dtype=torch.complex64))
    with pytest.raises(TypeError, match=r"complex64 cannot be perturbed; .*view_as_complex"):
        SharpnessAwareOptimizer(torch.optim.SGD([w], lr=0.1), SAMPerturbation())


def test_an_autocast_around_the_step_keeps_no_old_weights():
    gaps = []
    for around in (False, True):
        model = net().eval()
        optimizer = SharpnessAwareOptimizer(sgd(model), SAMPerturbation(2.0))
        ((x, y),) = batches(1)

        def closure(model=model, optimizer=optimizer, x=x, y=y):
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.bfloat16):
                loss = nn.functional.cross_entropy(model(x), y)
            loss.backward()
            return loss

        with torch.autocast("cpu", torch.bfloat16, enabled=around):
            optimizer.step(closure)
        gaps.append(optimizer.metrics["loss_gap"])
    assert gaps[0] > 0.1 and gaps[0] == gaps[1]


def test_buffers_that_a_module_replaces_are_restored_too():
    class Counter(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("seen", torch.zeros(()))
            self.linear = nn.Linear(2, 1)

        def forward(self, x):
            self.seen = self.seen + 1  # a new tensor, as many modules do
            return self.linear(x) * self.seen

    model = Counter()
    optimizer = SharpnessAwareOptimizer(sgd(model), SAMPerturbation(), model=model)

    def closure(fail=False):
        optimizer.zero_grad()
        loss = model(torch.ones(3, 2)).sum()
        loss.backward()
        if fail:
            raise Injected
        return loss

    optimizer.step(closure)
    assert model.seen == 1
    buffer = model.seen
    with pytest.raises(Injected):
        optimizer.step(lambda: closure(fail=True))
    assert model.seen is buffer and model.seen == 1


def test_state_groups_and_hooks_are_the_base_optimizers():
    model = net()
    base = sgd(model)
    optimizer = SharpnessAwareOptimizer(base, SAMPerturbation(), model=model)
    assert optimizer.state is base.state and optimizer.param_groups is base.param_groups
    seen = []
    optimizer.register_step_pre_hook(lambda *_: seen.append("wrapper"))
    base.register_step_post_hook(lambda *_: seen.append("base"))
    optimizer.register_state_dict_post_hook(lambda *_: seen.append("state_dict"))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: 0.5**epoch)
    train(model, optimizer, 2)
    assert seen == ["wrapper", "base"] * 2
    schedule.step()
    assert base.param_groups[0]["lr"] == 0.05
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert seen[-1] == "state_dict"
    assert optimizer.state is base.state and optimizer.param_groups is base.param_groups
    optimizer.add_param_group({"params": [nn.Parameter(torch.ones(1))], "lr": 3.0})
    assert base.param_groups[1]["lr"] == 3.0 and base.param_groups[1]["steps_taken"] == 2


@pytest.mark.parametrize("base", [*BASES.values(), lambda model: SASSHA(model.parameters())])
def test_the_class_carries_the_name_of_the_base(base):
    # Composer keys the optimizer's state by it: this is the checkpoint format.
    model = net()
    plain = base(model)
    wrapper = SharpnessAwareOptimizer(plain, SAMPerturbation())
    assert isinstance(wrapper, SharpnessAwareOptimizer)
    assert type(wrapper).__qualname__ == type(plain).__qualname__
    assert type(wrapper) is type(SharpnessAwareOptimizer(base(net())))


def test_a_plain_checkpoint_continues_under_sam_and_back():
    model = net()
    plain = sgd(model)
    train(model, plain, 3)
    wrapped_model = copy.deepcopy(model)
    wrapper = SharpnessAwareOptimizer(sgd(wrapped_model), SAMPerturbation(0.0), model=wrapped_model)
    wrapper.load_state_dict(copy.deepcopy(plain.state_dict()))
    assert wrapper.steps_taken == 0
    torch.manual_seed(1)
    train(model, plain, 2)
    torch.manual_seed(1)
    train(wrapped_model, wrapper, 2)
    assert_same(copied(model.state_dict()), copied(wrapped_model.state_dict()))
    back = sgd(wrapped_model)
    back.load_state_dict(wrapper.state_dict())
    assert_same(copied(back.state_dict()["state"]), copied(plain.state_dict()["state"]))


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies_and_pickles(duplicate):
    model = net()
    optimizer = SharpnessAwareOptimizer(sgd(model), SAMPerturbation(0.2), 2, model=model, partial_ascent=True)
    train(model, optimizer, 3)
    other = duplicate(optimizer)
    assert other.steps_taken == 3 and other.interval == 2 and other.perturbation == optimizer.perturbation
    assert other.partial_ascent
    assert_same(copied(other.model.state_dict()), copied(model.state_dict()))
    torch.manual_seed(0)
    train(model, optimizer, 2)
    torch.manual_seed(0)
    train(other.model, other, 2)
    assert_same(copied(other.model.state_dict()), copied(model.state_dict()))


def test_a_partial_ascent_only_says_where_to_take_the_gradient():
    """Loss, BatchNorm's statistics and random numbers are those of one pass over the whole batch at w + e."""
    model, there = net(), net()
    (x, y), *_ = batches(1)
    optimizer = SharpnessAwareOptimizer(sgd(model), SAMPerturbation(0.2), model=model, partial_ascent=True)
    phases = []

    def loss_of(net, part):
        return nn.functional.cross_entropy(net(x[part]), y[part])

    def closure():
        phases.append(optimizer.phase)
        optimizer.zero_grad()
        loss = loss_of(model, slice(2 if optimizer.phase == "ascent" else None))
        loss.backward()
        return loss

    torch.manual_seed(5)
    loss_of(there, slice(2)).backward()  # the ascent, which draws as many random numbers as it wants
    there.load_state_dict({**there.state_dict(), **dict(net().named_buffers())})
    norm = torch.stack([p.grad.norm() for p in there.parameters()]).norm()
    with torch.no_grad():
        for p in there.parameters():
            p += 0.2 * p.grad / norm
    torch.manual_seed(5)
    expected = loss_of(there, slice(None))
    states = rng_states()

    torch.manual_seed(5)
    torch.testing.assert_close(optimizer.step(closure), expected)
    assert phases == ["ascent", "descent"] and "loss_gap" not in optimizer.metrics
    assert_same(rng_states(), states)
    for (name, ours), (_, theirs) in zip(model.named_buffers(), there.named_buffers(), strict=True):
        torch.testing.assert_close(ours, theirs, msg=name)


def test_without_a_closure_only_a_zero_learning_rate_steps():
    model = net()
    optimizer = SharpnessAwareOptimizer(sgd(model), SAMPerturbation())
    with pytest.raises(RuntimeError, match="needs a closure"):
        optimizer.step()
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.param_groups[0]["lr"] = 0.0
    optimizer.step()
    assert optimizer.steps_taken == 0 and len(optimizer.state) == len([*model.parameters()])


def test_bad_arguments_are_refused_in_one_line():
    model = net()
    with pytest.raises(TypeError, match="wrapped already"):
        SharpnessAwareOptimizer(SharpnessAwareOptimizer(sgd(model)))
    with pytest.raises(TypeError, match=r"not a torch\.optim\.Optimizer"):
        SharpnessAwareOptimizer(model.parameters())  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="LBFGS"):
        SharpnessAwareOptimizer(torch.optim.LBFGS(model.parameters()))
    with pytest.raises(ValueError, match="interval=0"):
        SharpnessAwareOptimizer(sgd(model), SAMPerturbation(), interval=0)
    with pytest.raises(TypeError, match=r"composer_sassha\.perturbations"):
        SharpnessAwareOptimizer(sgd(model), 0.05)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="SGD takes no curvature"):
        SharpnessAwareOptimizer(sgd(model), curvature=LazyCurvature())


def test_a_refresh_pass_that_does_not_come_by_backward_is_refused():
    model = net()
    optimizer = SharpnessAwareOptimizer(SASSHA(model.parameters()), curvature=LazyCurvature())
    with pytest.raises(RuntimeError, match=r"call optimizer.backward\(loss\) instead of loss.backward\(\)"):
        train(model, optimizer, 1)


def test_a_hessian_that_is_not_finite_is_tried_again():
    model = net()
    optimizer = SharpnessAwareOptimizer(
        SASSHA(model.parameters(), lr=0.01), curvature=LazyCurvature(interval=3), model=model
    )
    bad_steps = {0, 4}
    step = -1
    refreshes = []
    before = copied(model.state_dict())
    for x, y in batches(7):
        step += 1

        def closure(x=x, y=y, step=step):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(x), y)
            optimizer.backward(loss)
            if optimizer.refresh.estimation is not None and step in bad_steps:
                optimizer.refresh.estimation._sum._total.fill_(math.nan)
            return loss

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            optimizer.step(closure)
        if step == 0:  # before the first estimate: skipped
            assert optimizer.steps_taken == 0 and optimizer.skipped_steps == 1
            assert_same(before, copied(model.state_dict()))
        refreshes.append(optimizer.param_groups[0]["refreshes"])
    # Step 1 is the first that counts (0), so the next refresh is due at batch 4, fails, and comes at batch 5.
    assert refreshes == [0, 1, 1, 1, 1, 2, 2]
    assert optimizer.steps_taken == 6 and optimizer.param_groups[0]["last_refresh"] == 4


def test_other_attributes_are_the_base_optimizers():
    class Custom(torch.optim.SGD):
        flavour = "vanilla"

    optimizer = SharpnessAwareOptimizer(Custom([nn.Parameter(torch.ones(1))], lr=0.1), SAMPerturbation())
    assert optimizer.flavour == "vanilla"
    assert "Custom" in repr(optimizer) and "SAMPerturbation(rho=0.05, p=2)" in repr(optimizer)
    with pytest.raises(AttributeError, match="nonsense"):
        optimizer.nonsense  # noqa: B018


def test_only_the_second_pass_of_replicas_is_synchronized():
    # With real ranks: tests/distributed. Here: what the runner asks of the wrapped model.
    class Recorder(nn.parallel.DistributedDataParallel):
        def __init__(self, module):  # needs no process group; another test may have left one
            nn.Module.__init__(self)
            self.module, self.unsynced, self.process_group = module, 0, torch.distributed.group.WORLD

        def no_sync(self):
            self.unsynced += 1
            return contextlib.nullcontext()

        def forward(self, x):
            return self.module(x)

    for sync_ascent, expected in ((False, 2), (True, 0)):
        model = Recorder(net())
        optimizer = SharpnessAwareOptimizer(
            sgd(model), SAMPerturbation(), model=model, sync_ascent=sync_ascent
        )
        train(model, optimizer, 2)
        assert model.unsynced == expected


def test_branches_that_take_turns_are_measured_before_they_move():
    class TakingTurns(nn.Module):
        def __init__(self):
            super().__init__()
            self.branches = nn.ModuleList([nn.Linear(2, 1), nn.Linear(2, 1)])
            self.turn = 0

        def forward(self, x):
            return self.branches[self.turn](x)

    model = TakingTurns()
    start = copied(model.state_dict())
    optimizer = SharpnessAwareOptimizer(
        SASSHA(model.parameters(), lr=0.1),
        SAMPerturbation(0.1),
        curvature=LazyCurvature(interval=3),
        model=model,
    )
    x, y = torch.randn(8, 2), torch.randn(8, 1)

    def closure():
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(model(x), y)
        optimizer.backward(loss)
        return loss

    for step in range(4):  # the first refresh sees branch 0, the second branch 1
        model.turn = step % 2
        optimizer.step(closure)
        if step == 2:
            assert_same(start["branches.1.weight"], copied(model.state_dict())["branches.1.weight"])
    for p in model.parameters():
        assert p.abs().max() < 2 and optimizer.state[p]["hessian_step"] > 0


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")
def test_buffers_that_allow_no_writes_are_left_alone():
    model = net()
    model.register_buffer("expanded", torch.zeros(1).expand(5))
    with torch.inference_mode():
        model.register_buffer("inference", torch.ones(3))
    model.register_buffer("compressed", torch.eye(3).to_sparse_csr())
    model.register_buffer("coordinates", torch.eye(3).to_sparse())
    optimizer = SharpnessAwareOptimizer(sgd(model), SAMPerturbation(), model=model)
    train(model, optimizer, 2)
    assert model.expanded.shape == (5,) and optimizer.steps_taken == 2


def test_a_model_and_its_optimizer_are_copied_together():
    model = net()
    optimizer = SharpnessAwareOptimizer(
        SASSHA(model.parameters()), SAMPerturbation(), curvature=LazyCurvature(), model=model
    )
    other_model, other = copy.deepcopy((model, optimizer))
    assert other.model is other_model and other.curvature is not optimizer.curvature
    assert other.param_groups[0]["params"][0] is next(other_model.parameters())


def test_a_hessian_that_is_never_finite_ends_the_training():
    w = nn.Parameter(torch.zeros(2))
    optimizer = SharpnessAwareOptimizer(SASSHA([w]), curvature=LazyCurvature())

    def closure():
        optimizer.zero_grad()
        loss = (w.abs() ** 1.5).sum()
        optimizer.backward(loss)
        return loss

    with pytest.warns(UserWarning, match="not finite"):
        for _ in range(9):
            assert optimizer.step(closure) is None
    assert optimizer.metrics == {"skipped_steps": 9, "failed_refreshes": 9}
    with pytest.raises(RuntimeError, match="infinite second derivative"):
        optimizer.step(closure)


@pytest.mark.parametrize("loss", [{"loss": 1.0}, (1.0, 2.0), torch.ones(3)])
def test_a_closure_must_return_one_number(loss):
    model = net()
    optimizer = SharpnessAwareOptimizer(sgd(model), SAMPerturbation())
    with pytest.raises(TypeError, match="must return its loss"):
        optimizer.step(lambda: loss)


def test_sparse_gradients_are_refused():
    embedding = nn.Embedding(4, 2, sparse=True)
    optimizer = SharpnessAwareOptimizer(torch.optim.SGD(embedding.parameters(), lr=0.1), SAMPerturbation())

    def closure():
        loss = embedding(torch.tensor([1])).sum()
        loss.backward()
        return loss

    with pytest.raises(RuntimeError, match="sparse=False"):
        optimizer.step(closure)


def test_what_is_not_a_curvature_is_refused():
    with pytest.raises(TypeError, match=r"curvature=10 .*LazyCurvature"):
        SharpnessAwareOptimizer(SASSHA(net().parameters()), curvature=10)  # type: ignore[arg-type]


def test_the_descent_does_not_add_up_on_the_ascent():
    w = nn.Parameter(torch.tensor([1.0]))
    optimizer = SharpnessAwareOptimizer(torch.optim.SGD([w], lr=0.1), SAMPerturbation(0.5))

    def closure():  # forgets zero_grad
        loss = (w**2).sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    assert w.item() == pytest.approx(1 - 0.1 * 2 * 1.5)


class Attention(nn.Module):
    """Fused attention, which has no second derivative."""

    def __init__(self):
        super().__init__()
        self.qkv, self.head = nn.Linear(8, 24), nn.Linear(8, 2)

    def forward(self, x):
        q, k, v = self.qkv(x.view(-1, 1, 4, 1).expand(-1, 2, 4, 8)).chunk(3, dim=-1)
        return self.head(nn.functional.scaled_dot_product_attention(q, k, v, dropout_p=0.0).mean(dim=(1, 2)))


def test_refresh_passes_find_a_second_derivative_of_attention():
    model = Attention()
    optimizer = SharpnessAwareOptimizer(
        SASSHA(model.parameters(), lr=0.01), SAMPerturbation(), curvature=LazyCurvature(2), model=model
    )
    train(model, optimizer, 4, backward=optimizer.backward)
    assert optimizer.param_groups[0]["refreshes"] == 2


def test_only_refresh_passes_of_a_compiled_model_run_eagerly():
    torch._dynamo.reset()
    counts = {"compiled": 0}

    def backend(graph, inputs):
        def run(*args):
            counts["compiled"] += 1
            return graph(*args)

        return run

    model = net()
    compiled = torch.compile(model, backend=backend)
    optimizer = SharpnessAwareOptimizer(
        SASSHA(model.parameters(), lr=0.01), SAMPerturbation(), curvature=LazyCurvature(2), model=model
    )
    train(compiled, optimizer, 4, backward=optimizer.backward)
    assert optimizer.param_groups[0]["refreshes"] == 2
    assert counts["compiled"] == 4  # two passes of two steps that do not refresh
