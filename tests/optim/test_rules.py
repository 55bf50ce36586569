"""What every update rule with a Hessian diagonal owes its users."""

import copy
import pickle
import re

import pytest
import torch
from torch import nn

from composer_sassha.optim import SASSHA, AdaHessian, Sophia
from tests.helpers import assert_same, copied
from tests.optim.rules import parameters, train

# How each rule is built, with settings that use all of it.
RULES = {
    "sassha": (SASSHA, {}),
    "sassha_power": (SASSHA, {"hessian_power": 0.7}),
    "adahessian": (AdaHessian, {"block_size": 2}),
    "adahessian_power": (AdaHessian, {"hessian_power": 0.7}),
    "sophia": (Sophia, {"clip_threshold": 1.0}),
}
AVERAGES = {SASSHA: "exp_hessian", AdaHessian: "exp_hessian_sq", Sophia: "exp_hessian"}

every_setting = pytest.mark.parametrize(("rule", "settings"), RULES.values(), ids=RULES.keys())
every_rule = pytest.mark.parametrize("rule", AVERAGES)
every_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])


def everything(params, optimizer):
    return copied([[p.detach() for p in params], optimizer.state_dict()["state"]])


@every_dtype
@every_setting
def test_foreach_on_and_off_agree_bit_for_bit(rule, settings, dtype):
    runs = []
    for foreach in (True, False):
        params = parameters(dtype)
        optimizer = rule(params, 0.1, weight_decay=0.1, foreach=foreach, **settings)
        train(optimizer, params, range(1, 9))
        runs.append(everything(params, optimizer))
    assert_same(runs[0], runs[1])


@every_dtype
@every_setting
def test_a_saved_state_continues_bit_for_bit(rule, settings, dtype, tmp_path):
    params = parameters(dtype)
    optimizer = rule(params, **settings)
    train(optimizer, params, range(1, 6))
    torch.save([[p.detach() for p in params], optimizer.state_dict()], tmp_path / "state.pt")
    weights, state = torch.load(tmp_path / "state.pt", weights_only=True)
    resumed = [nn.Parameter(w) for w in weights]
    other = rule(resumed)
    other.load_state_dict(state)
    for name in ("exp_avg", AVERAGES[rule]):
        assert other.state[resumed[0]][name].dtype == torch.promote_types(dtype, torch.float32)
    train(optimizer, params, range(6, 11))
    train(other, resumed, range(6, 11))
    assert_same(everything(params, optimizer), everything(resumed, other))


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda tree: pickle.loads(pickle.dumps(tree))])
@every_setting
def test_copies_continue_bit_for_bit(rule, settings, duplicate):
    params = parameters(torch.bfloat16)
    optimizer = rule(params, **settings)
    train(optimizer, params, range(1, 6))
    twin_params, twin = duplicate((params, optimizer))
    train(optimizer, params, range(6, 11))
    train(twin, twin_params, range(6, 11))
    assert_same(everything(params, optimizer), everything(twin_params, twin))


@every_rule
def test_mixed_dtypes_and_groups_with_their_own_hyperparameters(rule):
    narrow, wide = parameters(torch.bfloat16)[0], parameters(torch.float64)[1]
    p = nn.Parameter(torch.ones(2))
    groups = [{"params": [narrow, wide], "lr": 0.0}, {"params": [p], "lr": 1.0, "eps": 0.0}]
    optimizer = rule(groups, betas=(0.0, 0.0))
    before = [narrow.detach().clone(), wide.detach().clone()]
    for q in (narrow, wide, p):
        q.grad = torch.full_like(q, 2.0)
    optimizer.update_curvature({q: torch.full_like(q, 4.0) for q in (narrow, wide, p)})
    optimizer.step()
    assert torch.equal(narrow, before[0]) and torch.equal(wide, before[1])
    moved = {SASSHA: 0.0, AdaHessian: 0.5, Sophia: 0.0}  # by 2 / sqrt(4), 2 / 4, and 2 / (0.01 * 4) clipped
    assert p.tolist() == [moved[rule]] * 2


@every_rule
def test_the_first_step_creates_the_whole_state_and_does_not_count(rule):
    # This is how torch.distributed.checkpoint makes the state of a fresh optimizer before it saves or loads.
    used, unused = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(3))
    frozen = nn.Parameter(torch.ones(1), requires_grad=False)
    optimizer = rule([used, unused, frozen], lr=0.0)
    used.grad = torch.zeros(2)
    optimizer.step()
    names = {"step", "exp_avg", AVERAGES[rule], "hessian_step"}
    assert {*optimizer.state} == {used, unused}
    for p in (used, unused):
        assert {*optimizer.state[p]} == names
        assert not any(torch.as_tensor(value).any() for value in optimizer.state[p].values())
        assert p.tolist() == [1.0] * len(p)
    used.grad = torch.ones(2)
    optimizer.step()  # a warm-up from zero: a real step
    assert optimizer.state[used]["step"] == 1 and used.tolist() == [1.0, 1.0]


@every_rule
def test_parameters_without_a_gradient_are_left_alone(rule):
    p, q = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    optimizer = rule([p, q], weight_decay=1.0)
    p.grad = torch.ones(2)
    optimizer.update_curvature({p: torch.ones(2)})
    optimizer.step()
    assert q.tolist() == [1.0, 1.0] and optimizer.state[q]["step"] == 0


@every_rule
def test_a_parameter_that_the_first_refresh_missed_gathers_momentum_and_waits(rule):
    p, q = nn.Parameter(torch.ones(1)), nn.Parameter(torch.ones(1))
    optimizer = rule([p, q], betas=(0.9, 0.99))
    optimizer.update_curvature({p: torch.ones(1)})
    p.grad, q.grad = torch.ones(1), torch.ones(1)
    optimizer.step()
    assert p.item() < 1 and q.item() == 1
    assert optimizer.state[q]["exp_avg"].item() == pytest.approx(0.1)
    optimizer.update_curvature({q: torch.ones(1)})
    optimizer.step()
    assert q.item() < 1


@every_rule
def test_a_step_before_any_estimate_says_what_to_add_and_changes_nothing(rule):
    p = nn.Parameter(torch.ones(2))
    optimizer = rule([p])
    p.grad = torch.ones(2)
    with pytest.raises(RuntimeError, match=rf"^{rule.__name__}: no Hessian.*LazyHessian\(\) to the Trainer"):
        optimizer.step()
    with pytest.raises(RuntimeError, match=r"or call update_curvature\(\) before step\(\)$"):
        optimizer.step()
    assert p.tolist() == [1.0, 1.0]
    assert optimizer.state[p]["step"] == 0 and not optimizer.state[p]["exp_avg"].any()


COMMON = [
    ("lr", -0.1, "a number >= 0"),
    ("lr", float("nan"), "a number >= 0"),
    ("lr", "0.1", "a number >= 0"),
    ("betas", (0.9, 1.0), "a number in [0, 1)"),
    ("betas", (-0.1, 0.9), "a number in [0, 1)"),
    ("betas", 0.9, "two numbers, each in [0, 1)"),
    ("eps", -1e-8, "a number >= 0"),
    ("weight_decay", -1, "a number >= 0"),
    ("foreach", 1, "True or False"),
]
POWER = [("hessian_power", value, "a number in [0, 1]") for value in (1.5, -0.5, "1")]
BLOCK = [("block_size", value, "an integer >= 1") for value in (0, -1, 2.0, True)]
CLIP = [("clip_threshold", value, "a number >= 0") for value in (-0.01, float("inf"), None)]
OWN = {SASSHA: POWER, AdaHessian: POWER + BLOCK, Sophia: CLIP}


@pytest.mark.parametrize(
    ("rule", "argument", "value", "allowed"),
    [(rule, *row) for rule, own in OWN.items() for row in COMMON + own],
)
def test_bad_hyperparameters_are_refused_in_one_line(rule, argument, value, allowed):
    line = rf"^{rule.__name__}: {argument}(\[\d\])?=.* is not allowed; it must be {re.escape(allowed)}$"
    group = {"params": [nn.Parameter(torch.ones(1))], argument: value}
    with pytest.raises((ValueError, TypeError), match=line):
        rule([nn.Parameter(torch.ones(1))], **{argument: value})
    with pytest.raises((ValueError, TypeError), match=line):
        rule([group])

    optimizer = rule([nn.Parameter(torch.ones(1))])
    with pytest.raises((ValueError, TypeError), match=line):
        optimizer.add_param_group(group)
    assert len(optimizer.param_groups) == 1
    optimizer.check_group(optimizer.param_groups[0])
    optimizer.param_groups[0][argument] = value  # what a schedule may do
    with pytest.raises((ValueError, TypeError), match=line):
        optimizer.check_group(optimizer.param_groups[0])


@every_rule
def test_whole_numbers_will_do(rule):
    p = nn.Parameter(torch.ones(2))
    optimizer = rule([p], lr=1, betas=[0, 0], eps=0, weight_decay=0)
    p.grad = torch.full((2,), 4.0)
    optimizer.update_curvature({p: torch.full((2,), 16.0)})
    optimizer.step()
    assert p.tolist() == [{SASSHA: 0.0, AdaHessian: 0.75, Sophia: 0.0}[rule]] * 2


@every_rule
def test_complex_and_integer_parameters_and_sparse_gradients_are_refused(rule):
    with pytest.raises(TypeError, match=f"{rule.__name__}: a parameter of dtype torch.complex64"):
        rule([nn.Parameter(torch.ones(1, dtype=torch.complex64))])
    late = nn.Parameter(torch.ones(1, dtype=torch.complex64), requires_grad=False)
    optimizer = rule([late])
    late.requires_grad_()
    with pytest.raises(TypeError, match=f"{rule.__name__}: a parameter of dtype torch.complex64"):
        optimizer.step()
    embedding = nn.Embedding(4, 2, sparse=True)
    optimizer = rule(embedding.parameters())
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(RuntimeError, match=f"{rule.__name__}: sparse gradients .* sparse=False"):
        optimizer.step()


@every_rule
def test_estimates_that_do_not_fit_are_refused(rule):
    p, frozen = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2), requires_grad=False)
    optimizer = rule([p, frozen])
    with pytest.raises(ValueError, match=rf"{rule.__name__}: .* \(3,\) for a parameter of \(2,\)"):
        optimizer.update_curvature({p: torch.ones(3)})
    for stranger in (torch.ones(2), frozen):
        with pytest.raises(ValueError, match=f"{rule.__name__}: .* not trained"):
            optimizer.update_curvature({p: torch.ones(2), stranger: torch.ones(2)})
    assert not optimizer.state


@every_rule
def test_the_caller_keeps_its_gradients_and_estimates(rule):
    p = nn.Parameter(torch.randn(2, 3, 2))
    grad, estimate = torch.randn_like(p), torch.randn_like(p)
    p.grad = grad
    before = copied([grad, estimate])
    optimizer = rule([p], weight_decay=0.1)
    optimizer.update_curvature({p: estimate})
    optimizer.step()
    assert_same(before, [grad, estimate])


@every_rule
def test_closure_add_param_group_and_hooks(rule):
    p = nn.Parameter(torch.ones(2))
    optimizer = rule([p])
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
    optimizer.add_param_group({"params": nn.Parameter(torch.ones(1)), "lr": 0.5})
    assert optimizer.param_groups[1]["lr"] == 0.5
    assert optimizer.param_groups[1]["eps"] == optimizer.defaults["eps"]


@pytest.mark.parametrize(
    ("rule", "owner", "operation"),
    [
        (SASSHA, torch, "_foreach_abs"),
        (SASSHA, torch, "_foreach_div"),
        (AdaHessian, torch.Tensor, "mean"),
        (AdaHessian, torch, "_foreach_div"),
        (Sophia, torch, "_foreach_mul"),
    ],
)
def test_an_update_that_runs_out_of_memory_has_changed_nothing(rule, owner, operation, monkeypatch):
    params = parameters()
    groups = [{"params": params[:3]}, {"params": params[3:]}]
    optimizer = rule(groups)
    train(optimizer, params, range(1, 3))
    before = everything(params, optimizer)
    works, calls = getattr(owner, operation), 0

    def out_of_memory(*args, **kwargs):
        nonlocal calls
        calls += 1
        if calls == later:  # in the second group, where an estimate enters: the first must not have it either
            raise torch.OutOfMemoryError
        return works(*args, **kwargs)

    later = 2 if operation == "_foreach_abs" else 1
    monkeypatch.setattr(owner, operation, out_of_memory)
    with pytest.raises(torch.OutOfMemoryError):
        if operation in ("_foreach_abs", "mean"):
            optimizer.update_curvature({p: torch.ones_like(p) for p in params})
        else:
            optimizer.step()
    assert_same(before, everything(params, optimizer))


FOREIGN = {
    "a group without a hyperparameter": (lambda s: s["param_groups"][0].pop("betas"), "have no betas"),
    "a state without an entry": (
        lambda s: s["state"][0].pop("hessian_step"),
        "parameter 0 .* no hessian_step",
    ),
    "another model's": (
        lambda s: s["state"][1].update(exp_avg=torch.zeros(7)),
        r"exp_avg of parameter 1 .* shape \(7,\)",
    ),
}


@every_rule
@pytest.mark.parametrize(("change", "message"), FOREIGN.values(), ids=FOREIGN)
def test_a_foreign_state_is_refused_in_one_line_and_nothing_is_loaded(rule, change, message):
    optimizer = rule([nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(2))])
    for p in optimizer.param_groups[0]["params"]:
        p.grad = torch.ones_like(p)
    optimizer.update_curvature({p: torch.ones_like(p) for p in optimizer.param_groups[0]["params"]})
    optimizer.step()
    foreign = copy.deepcopy(optimizer.state_dict())
    change(foreign)
    before = copied(optimizer.state_dict())
    with pytest.raises(ValueError, match=message) as error:
        optimizer.load_state_dict(foreign)
    assert "load the weights alone" in str(error.value) and "\n" not in str(error.value)
    assert_same(before, optimizer.state_dict())


def trained(rule):
    optimizer = rule([nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(2))])
    params = optimizer.param_groups[0]["params"]
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.update_curvature({p: torch.ones_like(p) for p in params})
    optimizer.step()
    return optimizer


@every_rule
@pytest.mark.parametrize("copying", [lambda o: o, copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))])
def test_a_state_is_loaded_any_number_of_times(rule, copying):
    optimizer = trained(rule)
    saved = copy.deepcopy(optimizer.state_dict())
    again = copying(optimizer)
    for _ in range(3):
        again.load_state_dict(copy.deepcopy(saved))
        assert_same(saved, again.state_dict())


@every_rule
def test_a_hyperparameter_that_a_state_lacks_takes_its_default(rule):
    optimizer = trained(rule)
    saved = copy.deepcopy(optimizer.state_dict())
    del saved["param_groups"][0]["weight_decay"]
    optimizer.param_groups[0]["weight_decay"] = 0.5
    optimizer.load_state_dict(saved)
    assert optimizer.param_groups[0]["weight_decay"] == optimizer.defaults["weight_decay"]


@pytest.mark.parametrize("rule", [SASSHA, AdaHessian])
def test_the_zero_fraction_is_that_of_the_entries_that_a_step_moves(rule):
    p, waiting, idle, unmeasured = (nn.Parameter(torch.ones(n)) for n in (4, 2, 2, 2))
    optimizer = rule([p, waiting, idle, unmeasured])
    assert optimizer.zero_fraction() == 0.0
    curvature = {p: torch.tensor([0.0, 1.0, 0.0, 0.0]), waiting: torch.zeros(2), idle: torch.zeros(2)}
    for grad in ([1.0, 1.0, 0.0, 0.0], [0.0, 1.0, 1.0, 0.0]):  # the first entry has momentum then
        p.grad, idle.grad, unmeasured.grad = torch.tensor(grad), torch.zeros(2), torch.ones(2)
        optimizer.update_curvature(curvature)
        found = optimizer.zero_fraction()
        optimizer.step()
    assert found == pytest.approx(2 / 3)


@every_setting
@pytest.mark.parametrize("foreach", [True, False])
def test_a_tensor_is_a_learning_rate_that_a_scheduler_writes_into(rule, settings, foreach):
    ends = []
    for lr in (0.125, torch.tensor(0.125)):
        params = parameters()
        optimizer = rule(params, lr, foreach=foreach, weight_decay=0.1, **settings)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: 0.5**t)
        for t in range(1, 6):
            train(optimizer, params, range(t, t + 1))
            schedule.step()
        assert (optimizer.param_groups[0]["lr"] is lr) == isinstance(lr, torch.Tensor)
        assert float(lr) == (0.125 if isinstance(lr, float) else 0.125 * 0.5**5)
        ends.append(everything(params, optimizer))
    assert_same(*ends)


@every_rule
@pytest.mark.parametrize("lr", [torch.tensor(-0.1), torch.tensor([0.1, 0.2])])
def test_a_tensor_that_is_no_learning_rate_is_refused(rule, lr):
    with pytest.raises((TypeError, ValueError), match=f"{rule.__name__}: lr=.* must be a number >= 0"):
        rule([nn.Parameter(torch.ones(1))], lr=lr)


@every_rule
def test_maximizing_is_refused_in_one_line(rule):
    group = {"params": [nn.Parameter(torch.ones(1))], "maximize": True}
    with pytest.raises(ValueError, match=f"{rule.__name__}: maximize=True .* negative of the loss") as error:
        rule([group])
    assert "\n" not in str(error.value)
    rule([{**group, "maximize": False}])


@every_rule
def test_named_parameters_duplicates_and_empty_groups_are_torchs(rule):
    model = nn.Linear(2, 3)
    optimizer = rule(model.named_parameters(), foreach=None)
    assert optimizer.param_groups[0]["param_names"] == ["weight", "bias"]
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert optimizer.param_groups[0]["param_names"] == ["weight", "bias"]
    p = nn.Parameter(torch.ones(1))
    with pytest.warns(UserWarning, match="duplicate"):
        rule([p, p])
    optimizer = rule([{"params": []}, {"params": [p]}])
    p.grad = torch.ones(1)
    optimizer.update_curvature({p: torch.ones(1)})
    optimizer.step()
    assert p.item() < 1


@every_setting
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_reported_norms_are_those_of_the_step(rule, settings, dtype):
    params, lr, decay = parameters(dtype), 0.25, 0.5
    optimizer = rule(params, lr, (0.0, 0.9), foreach=True, **settings)
    train(optimizer, params, range(1, 2))
    before = [p.detach().clone() for p in params]
    train(optimizer, params, range(2, 3))  # no estimate arrives
    optimizer.param_groups[0]["weight_decay"] = decay
    for i, (p, w) in enumerate(zip(params, before, strict=True)):
        found, state = optimizer.report_per_parameter_metrics(p, str(i), {"other": 1}), optimizer.state[p]
        expected = {"param": p, "grad": p.grad}
        if state["hessian_step"]:
            expected |= {"moment": state["exp_avg"], "curvature": state[AVERAGES[rule]]}
            expected["update"] = p - w - lr * decay * p
        assert found.pop("other") == 1 and found.keys() == {f"l2_norm/{kind}/{i}" for kind in expected}
        for kind, tensor in expected.items():
            rounding = 0.05 if kind == "update" and dtype == torch.bfloat16 else 1e-6
            assert found[f"l2_norm/{kind}/{i}"] == pytest.approx(tensor.double().norm().item(), rel=rounding)
