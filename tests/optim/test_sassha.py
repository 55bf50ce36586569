"""SASSHA against its equations, and against what an optimizer owes its users."""

import copy

import pytest
import torch
from torch import nn

from composer_sassha import SASSHA
from tests.helpers import assert_same, copied


def parameters(dtype=torch.float64):
    torch.manual_seed(1)
    return [nn.Parameter(torch.randn(shape, dtype=dtype)) for shape in ((3, 4), (5,), ())]


def feed(optimizer, params, step, *, refresh):
    generator = torch.Generator().manual_seed(step)
    draws = [
        [torch.randn(p.shape, generator=generator, dtype=torch.float64) for p in params] for _ in range(2)
    ]
    for p, grad in zip(params, draws[0], strict=True):
        p.grad = grad.to(p.dtype)
    if refresh:
        optimizer.update_curvature({p: h.to(p.dtype) for p, h in zip(params, draws[1], strict=True)})
    optimizer.step()
    return draws


@pytest.mark.parametrize("foreach", [True, False])
@pytest.mark.parametrize("power", [0.0, 0.5, 1.0])
def test_follows_the_equations(foreach, power):
    params = parameters()
    w = [p.detach().clone() for p in params]
    m = [torch.zeros_like(p) for p in w]
    d = [torch.zeros_like(p) for p in w]
    lr, b1, b2, eps, decay = 0.1, 0.8, 0.95, 1e-3, 0.2
    optimizer = SASSHA(params, lr, (b1, b2), eps, decay, power, foreach=foreach)
    correction = None
    for t in range(1, 31):
        grads, hessians = feed(optimizer, params, t, refresh=t % 4 == 1)
        if t % 4 == 1:
            d = [b2 * d_i + (1 - b2) * h.abs() for d_i, h in zip(d, hessians, strict=True)]
            correction = 1 - b2**t
        for i, g in enumerate(grads):
            m[i] = b1 * m[i] + (1 - b1) * g
            w[i] = w[i] - lr * (m[i] / (1 - b1**t)) / ((d[i] / correction) ** power + eps) - lr * decay * w[i]
        for p, expected in zip(params, w, strict=True):
            torch.testing.assert_close(p.detach(), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("power", [0.5, 0.7])
def test_foreach_and_plain_agree_bit_for_bit(dtype, power):
    runs = []
    for foreach in (True, False):
        params = parameters(dtype)
        optimizer = SASSHA(params, 0.1, weight_decay=0.1, hessian_power=power, foreach=foreach)
        for t in range(7):
            feed(optimizer, params, t, refresh=t % 3 == 0)
        runs.append(copied([[p.detach() for p in params], optimizer.state_dict()["state"]]))
    for p, q in zip(runs[0][0], runs[1][0], strict=True):
        assert torch.equal(p, q)
    assert_same(runs[0][1], runs[1][1])


def test_mixed_dtypes_and_groups_with_their_own_hyperparameters():
    narrow, wide = parameters(torch.bfloat16)[0], parameters(torch.float64)[1]
    groups = [
        {"params": [narrow, wide], "lr": 0.0},
        {"params": [nn.Parameter(torch.ones(2))], "lr": 1.0, "eps": 0.0},
    ]
    optimizer = SASSHA(groups, betas=(0.0, 0.0))
    before = [narrow.detach().clone(), wide.detach().clone()]
    params = [narrow, wide, groups[1]["params"][0]]
    for p in params:
        p.grad = torch.full_like(p, 2.0)
    optimizer.update_curvature({p: torch.full_like(p, 4.0) for p in params})
    optimizer.step()
    assert torch.equal(narrow, before[0]) and torch.equal(wide, before[1])
    assert params[2].tolist() == [0.0, 0.0]  # 1 - 1 * 2 / sqrt(4)


def test_half_precision_rounds_once_and_small_steps_add_up_in_float32_state():
    p = nn.Parameter(torch.tensor([1.0], dtype=torch.bfloat16))
    optimizer = SASSHA([p], lr=0.5, betas=(0.9, 0.999), weight_decay=0.01)
    p.grad = torch.tensor([1e-3], dtype=torch.bfloat16)
    optimizer.update_curvature({p: torch.ones_like(p)})
    optimizer.step()
    g = p.grad.double().item()
    assert p.item() == torch.tensor(1 - 0.5 * 0.01 - 0.5 * g / (1 + 1e-4)).bfloat16().item()
    assert optimizer.state[p]["exp_avg"].dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_saved_state_continues_bit_for_bit(dtype, tmp_path):
    params = parameters(dtype)
    optimizer = SASSHA(params)
    for t in range(5):
        feed(optimizer, params, t, refresh=t % 3 == 0)
    torch.save([[p.detach() for p in params], optimizer.state_dict()], tmp_path / "state.pt")
    weights, state = torch.load(tmp_path / "state.pt", weights_only=True)
    resumed = [nn.Parameter(w) for w in weights]
    other = SASSHA(resumed)
    other.load_state_dict(state)
    for t in range(5, 10):
        for opt, ps in ((optimizer, params), (other, resumed)):
            feed(opt, ps, t, refresh=t % 3 == 0)
    for p, q in zip(params, resumed, strict=True):
        assert torch.equal(p, q)
    assert_same(optimizer.state_dict()["state"], other.state_dict()["state"])
    assert other.state[resumed[0]]["exp_avg"].dtype == torch.promote_types(dtype, torch.float32)


def test_the_first_step_creates_the_whole_state_and_does_not_count():
    # This is how torch.distributed.checkpoint makes the state of a fresh optimizer before it saves or loads.
    used, unused = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(3))
    optimizer = SASSHA([used, unused], lr=0.0)
    used.grad = torch.zeros(2)
    optimizer.step()
    names = {"step", "exp_avg", "exp_hessian", "hessian_step"}
    assert {*optimizer.state[used]} == {*optimizer.state[unused]} == names
    assert optimizer.state[used]["step"] == 0
    used.grad = torch.ones(2)
    optimizer.step()  # a warm-up from zero: a real step
    assert optimizer.state[used]["step"] == 1 and used.tolist() == [1.0, 1.0]


def test_parameters_without_a_gradient_are_left_alone():
    p, q = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    optimizer = SASSHA([p, q], weight_decay=1.0)
    p.grad = torch.ones(2)
    optimizer.update_curvature({p: torch.ones(2)})
    optimizer.step()
    assert q.tolist() == [1.0, 1.0] and optimizer.state[q]["step"] == 0


def test_a_parameter_that_the_first_refresh_missed_gathers_momentum_and_waits():
    p, q = nn.Parameter(torch.ones(1)), nn.Parameter(torch.ones(1))
    optimizer = SASSHA([p, q])
    optimizer.update_curvature({p: torch.ones(1)})
    p.grad, q.grad = torch.ones(1), torch.ones(1)
    optimizer.step()
    assert p.item() < 1 and q.item() == 1
    assert optimizer.state[q]["exp_avg"].item() == pytest.approx(0.1)
    optimizer.update_curvature({q: torch.ones(1)})
    optimizer.step()
    assert q.item() < 1


def test_a_step_before_any_estimate_says_what_to_add_and_changes_nothing():
    p = nn.Parameter(torch.ones(2))
    optimizer = SASSHA([p])
    p.grad = torch.ones(2)
    with pytest.raises(RuntimeError, match=r"add composer_sassha.Sassha\(\) or LazyHessian\(\)"):
        optimizer.step()
    assert p.tolist() == [1.0, 1.0] and optimizer.state[p]["step"] == 0


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("lr", -0.1),
        ("lr", float("nan")),
        ("lr", "0.1"),
        ("betas", (0.9, 1.0)),
        ("betas", (-0.1, 0.9)),
        ("betas", 0.9),
        ("eps", -1e-8),
        ("weight_decay", -1),
        ("hessian_power", 1.5),
        ("hessian_power", -0.5),
        ("foreach", None),
    ],
)
def test_bad_hyperparameters_are_refused_by_name(argument, value):
    with pytest.raises((ValueError, TypeError), match=argument):
        SASSHA([nn.Parameter(torch.ones(1))], **{argument: value})
    with pytest.raises((ValueError, TypeError), match=argument):
        SASSHA([{"params": [nn.Parameter(torch.ones(1))], argument: value}])


def test_complex_and_integer_parameters_and_sparse_gradients_are_refused():
    with pytest.raises(TypeError, match="complex64"):
        SASSHA([nn.Parameter(torch.ones(1, dtype=torch.complex64))])
    with pytest.raises(TypeError, match="int64"):
        SASSHA([nn.Parameter(torch.ones(1, dtype=torch.int64), requires_grad=False)])
    embedding = nn.Embedding(4, 2, sparse=True)
    optimizer = SASSHA(embedding.parameters())
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(RuntimeError, match="sparse=False"):
        optimizer.step()


def test_estimates_that_do_not_fit_are_refused():
    p = nn.Parameter(torch.ones(2))
    optimizer = SASSHA([p])
    with pytest.raises(ValueError, match=r"\(3,\)"):
        optimizer.update_curvature({p: torch.ones(3)})
    with pytest.raises(ValueError, match="not trained"):
        optimizer.update_curvature({torch.ones(2): torch.ones(2)})


def test_closure_add_param_group_copy_and_hooks():
    p = nn.Parameter(torch.ones(2))
    optimizer = SASSHA([p])
    optimizer.update_curvature({p: torch.ones(2)})
    seen = []
    optimizer.register_step_pre_hook(lambda *_: seen.append("pre"))
    optimizer.register_step_post_hook(lambda *_: seen.append("post"))

    def closure():
        optimizer.zero_grad()
        loss = (p**2).sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 2 and seen == ["pre", "post"]
    optimizer.add_param_group({"params": [nn.Parameter(torch.ones(1))], "lr": 0.5})
    assert optimizer.param_groups[1]["lr"] == 0.5 and optimizer.param_groups[1]["eps"] == 1e-4
    assert copy.deepcopy(optimizer).param_groups[0]["lr"] == 0.15


def test_an_update_that_runs_out_of_memory_has_changed_nothing(monkeypatch):
    params = parameters()
    optimizer = SASSHA(params)
    feed(optimizer, params, 0, refresh=True)
    before = copied([[p.detach() for p in params], optimizer.state_dict()["state"]])

    def out_of_memory(*_):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(torch, "_foreach_div", out_of_memory)
    with pytest.raises(torch.OutOfMemoryError):
        feed(optimizer, params, 1, refresh=False)
    assert_same(before, copied([[p.detach() for p in params], optimizer.state_dict()["state"]]))
