"""The lazy refresh: schedule, stand-in losses, accumulation."""

import contextlib
import gc
import warnings
import weakref

import pytest
import torch
from torch import nn

from composer_sassha.common.validate import SettingError
from composer_sassha.curvature import (
    ESTIMATORS,
    Estimation,
    Evaluation,
    LazyCurvature,
    empirical_fisher_diagonal,
    finite_difference_diagonal,
    gauss_newton_diagonal,
    hutchinson_diagonal,
)
from tests.curvature.problems import Problem, flat


def test_refreshes_are_due_at_multiples_of_the_interval_and_until_one_succeeds():
    curvature = LazyCurvature(interval=4)
    last, refreshed = -1, []
    for step in range(14):
        if curvature.due(step, last) and step not in (0, 4, 5):  # these fail
            last = step
            refreshed.append(step)
    assert refreshed == [1, 6, 8, 12]


def test_the_stand_in_has_the_same_value_and_gradient_and_no_other_pass_builds_a_graph():
    w = nn.Parameter(torch.tensor([1.0, 2.0]))
    curvature = LazyCurvature()
    estimation = Estimation(curvature, [w], step=0)
    stand_in = estimation.attach((w**3).sum())
    assert stand_in.item() == 9 and stand_in.grad_fn is not None
    (stand_in * 0.25).backward()
    assert w.grad.tolist() == [0.75, 3.0]
    diagonal, metrics = estimation.finish()
    assert diagonal[w].tolist() == [1.5, 3.0]  # the weight that backward brings along counts
    assert metrics == {"mean_abs": 2.25, "negative_fraction": 0.0}


def test_unused_parameters_stay_unconnected_and_are_not_measured():
    # A zero would say that the loss is flat there, and the step divided by eps.
    w, unused, sometimes = (nn.Parameter(torch.ones(n)) for n in (2, 3, 1))
    curvature = LazyCurvature()
    estimation = Estimation(curvature, [w, unused, sometimes], step=0)
    estimation.attach((w**2).sum()).mul(0.5).backward()
    estimation.attach((w**2).sum() + (sometimes**3).sum()).mul(0.5).backward()
    assert unused.grad is None
    diagonal, _ = estimation.finish()
    assert {*diagonal} == {w, sometimes}
    assert diagonal[w].tolist() == [2, 2] and diagonal[sometimes].tolist() == [3]


def test_parameters_of_others_get_their_gradient_but_no_estimate():
    w, other = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    curvature = LazyCurvature()
    estimation = Estimation(curvature, [w], step=0)
    estimation.attach((w * other**2).sum()).backward()
    assert w.grad.tolist() == [1, 1] and other.grad.tolist() == [2, 2]
    assert {*estimation.finish()[0]} == {w}


def test_hooks_of_a_parameter_run_once_and_only_on_its_gradient():
    w = nn.Parameter(torch.tensor([2.0]))
    seen = []
    handle = w.register_hook(lambda grad: seen.append(grad.item()) or grad * 0.5)
    curvature = LazyCurvature()
    estimation = Estimation(curvature, [w], step=0)
    estimation.attach((w**3).sum()).backward()
    assert seen == [12.0] and w.grad.item() == 6.0
    assert estimation.finish()[0][w].item() == 12.0
    handle.remove()
    (w**2).sum().backward()
    assert seen == [12.0]


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
def test_a_loss_of_one_number_may_have_any_shape(shape):
    w = nn.Parameter(torch.tensor([2.0]))
    curvature = LazyCurvature()
    estimation = Estimation(curvature, [w], step=0)
    estimation.attach((w**3).reshape(shape)).backward()
    assert w.grad.item() == 12.0 and estimation.finish()[0][w].item() == 12.0


def test_mixed_dtypes_are_gathered_in_the_widest():
    narrow, wide = nn.Parameter(torch.ones(1).bfloat16()), nn.Parameter(torch.full((1,), 1 / 3).double())
    curvature = LazyCurvature()
    estimation = Estimation(curvature, [narrow, wide], step=0)
    estimation.attach((narrow.double() ** 3).sum() + (wide**3).sum()).backward()
    diagonal, _ = estimation.finish()
    assert diagonal[wide].dtype == torch.float64 and diagonal[wide].item() == 6 * wide.item()


def test_without_a_trainable_parameter_it_says_so():
    with pytest.raises(RuntimeError, match="no parameter that requires a gradient"):
        Estimation(LazyCurvature(), [], step=0)


def test_nothing_of_the_second_order_graph_outlives_backward():
    w = nn.Parameter(torch.randn(50))
    curvature = LazyCurvature(samples=2)
    estimation = Estimation(curvature, [w], step=0)
    alive = []

    def pack(tensor):
        saved = tensor.detach()
        alive.append(weakref.ref(saved))
        return saved

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved):
        loss = (w.tanh() ** 2).sum()
        stand_in = estimation.attach(loss)
    stand_in.backward()
    del loss
    gc.collect()
    assert len(alive) > 3 and not any(ref() is not None for ref in alive)
    with pytest.raises(RuntimeError, match="differentiated once"):
        stand_in.backward()


def test_sparse_gradients_are_refused():
    embedding = nn.Embedding(4, 2, sparse=True)
    curvature = LazyCurvature()
    estimation = Estimation(curvature, [embedding.weight], step=0)
    with pytest.raises(SettingError, match="build the embedding with sparse=False"):
        estimation.attach((embedding(torch.tensor([1])) ** 2).sum())


def test_the_gradient_of_a_microbatch_is_taken_at_its_share_of_the_scale():
    w = nn.Parameter(torch.ones(2))
    curvature = LazyCurvature()
    estimation = Estimation(
        curvature, [w], step=0, gradient_scale=2.0**128, scale=2.0
    )  # infinite in float32, but for the share
    loss = estimation.attach((w**2).sum(), size=1, batch_size=64)
    (loss * 2.0**100).backward()
    assert w.grad is not None and torch.equal(w.grad, torch.full((2,), 2.0**101))


@pytest.mark.parametrize("name", ["empirical_fisher", "hutchinson"])
def test_the_estimate_on_a_share_of_the_batch_is_free_of_the_gradients_scale(name):
    w = nn.Parameter(torch.full((2,), 4.0))  # the gradient 8 is infinite at the gradient's scale
    again = lambda count: contextlib.nullcontext((w**2).sum())  # noqa: E731
    curvature = LazyCurvature(estimator=name, batch_fraction=0.5)
    estimation = Estimation(curvature, [w], step=0, gradient_scale=2.0**127, scale=2.0)
    estimation.attach((w**2).sum(), size=4, batch_size=4, again=again).backward()
    diagonal, _ = estimation.finish()
    assert diagonal is not None and torch.isfinite(diagonal[w]).all()


def test_an_estimate_that_is_not_finite_is_reported_as_none():
    w = nn.Parameter(torch.zeros(2))
    curvature = LazyCurvature()
    estimation = Estimation(curvature, [w], step=0)
    estimation.attach((w.abs() ** 1.5).sum()).backward()  # the second derivative at 0 is infinite
    assert estimation.finish() == (None, {})


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("interval", 0),
        ("interval", 2.5),
        ("samples", 0),
        ("seed", -1),
        ("estimator", "hutchison"),
        ("estimator", ["x"]),
        ("batch_fraction", 0),
        ("batch_fraction", 1.5),
        ("batch_fraction", "half"),
        ("floor", -0.1),
        ("floor", 1.5),
        ("floor", None),
    ],
)
def test_bad_arguments_are_refused_by_name(argument, value):
    with pytest.raises((ValueError, TypeError), match=f"LazyHessian: {argument}="):
        LazyCurvature(**{argument: value})


def test_the_floor_raises_magnitudes_to_a_fraction_of_their_tensors_mean():
    a = torch.tensor([6.0, -2.0, 0.0, -0.0, 0.5, -0.5], dtype=torch.float64)
    w, flat, unused = (nn.Parameter(torch.ones(n, dtype=torch.float64)) for n in (6, 2, 3))
    # The mean magnitudes are 1.5 and 0; that of all 11 entries is 9 / 11.
    for floor, raised, zeros in ((0.4, [6, -2, 0.6, 0.6, 0.6, -0.6], 0.4 * 9 / 11), (0.0, a.tolist(), 0)):
        estimation = Estimation(LazyCurvature(floor=floor), [w, flat, unused], step=0)
        estimation.attach((a * w**2).sum() / 2 + flat.sum()).backward()
        diagonal, metrics = estimation.finish()
        assert {*diagonal} == {w, flat}
        assert diagonal[w].tolist() == pytest.approx(raised, rel=1e-15)
        assert diagonal[flat].tolist() == pytest.approx([zeros] * 2, rel=1e-15)
        assert metrics == {"mean_abs": 9 / 11, "negative_fraction": 2 / 11}  # before the floor


def test_samples_of_an_estimator_that_draws_nothing_are_refused():
    with pytest.raises(ValueError, match=r"samples=2 is not allowed; it must be 1 with estimator='empirical"):
        LazyCurvature(estimator="empirical_fisher", samples=2)


def estimate_on(problem, name, part, key):
    """The estimate on some samples, by the estimator's own function."""
    loss, params = problem.loss(part), problem.params
    if name == "gauss_newton":
        return flat(gauss_newton_diagonal(problem.logits(part), problem.y[part], params, [key]))
    grads = torch.autograd.grad(loss, params, create_graph=name == "hutchinson")
    if name == "hutchinson":
        return flat(hutchinson_diagonal(grads, params, [key]))
    if name == "empirical_fisher":
        return flat(empirical_fisher_diagonal(grads, len(problem.y[part])))
    return flat(
        finite_difference_diagonal(grads, params, [key], lambda: contextlib.nullcontext(problem.loss(part)))
    )


def refresh(problem, name, microbatches, **kwargs):
    """One pass over microbatches, weighted by their sizes, in a plain loop."""
    curvature = LazyCurvature(estimator=name, seed=5, **kwargs)
    estimation = Estimation(curvature, problem.params, step=3)
    for p in problem.params:
        p.grad = None
    start = 0
    for size in microbatches:
        part = slice(start, start + size)

        @contextlib.contextmanager
        def again(count, start=start):
            some = slice(start, start + count)
            yield Evaluation(problem.loss(some), problem.logits(some), problem.y[some])

        loss = estimation.attach(
            problem.loss(part),
            logits=problem.logits(part),
            labels=problem.y[part],
            size=size,
            batch_size=len(problem.y),
            again=again,
        )
        (loss * (size / len(problem.y))).backward()
        start += size
    diagonal, _ = estimation.finish()
    return flat([diagonal[p] for p in problem.params]), flat([p.grad for p in problem.params])


@pytest.mark.parametrize("name", ESTIMATORS)
@pytest.mark.parametrize(
    ("fraction", "parts"),
    [
        (1.0, [5, 5, 2]),
        (0.42, [5]),  # the first microbatch
        (0.5, [5, 1]),  # and one sample of the second
        (0.25, [3]),
        (0.01, [1]),  # at least one
    ],
)
def test_the_estimate_is_the_weighted_mean_over_the_share_of_the_batch(name, fraction, parts):
    problem = Problem(samples=12)
    diagonal, gradient = refresh(problem, name, [5, 5, 2], batch_fraction=fraction)
    expected = 0
    if name == "empirical_fisher":  # of the whole batch's gradient, which comes in parts
        parts = [sum(parts)]
    for microbatch, size in enumerate(parts):
        part = slice(5 * microbatch, 5 * microbatch + size)
        expected += size / sum(parts) * estimate_on(problem, name, part, (5, 3, 0, microbatch, 0))
    torch.testing.assert_close(diagonal, expected, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(gradient, problem.gradient(), rtol=1e-12, atol=1e-15)


def test_weights_of_any_kind_leave_the_share_an_estimate_of_the_whole():
    # The loss scale and the weight of a rank count as they do for the whole batch.
    w = nn.Parameter(torch.tensor([1.0, 2.0]))
    diagonals = []
    for fraction in (1.0, 0.5):
        curvature = LazyCurvature(batch_fraction=fraction)
        estimation = Estimation(curvature, [w], step=0)
        for weight in (3.0, 1.0):
            (estimation.attach((w**3).sum(), size=2, batch_size=4) * weight).backward()
        diagonals.append(estimation.finish()[0][w].tolist())
    assert diagonals == [[24.0, 48.0], [24.0, 48.0]]


def test_microbatches_beyond_the_share_are_not_differentiated_twice(monkeypatch):
    calls = []
    grad = torch.autograd.grad
    monkeypatch.setattr(torch.autograd, "grad", lambda *a, **k: calls.append(1) or grad(*a, **k))
    w = nn.Parameter(torch.tensor([1.0, 2.0]))
    curvature = LazyCurvature(batch_fraction=0.5)
    estimation = Estimation(curvature, [w], step=0)
    for _ in range(4):
        loss = (w**3).sum()
        estimation.attach(loss, size=2, batch_size=8).backward()
        assert not loss._backward_hooks
    assert len(calls) == 4  # two microbatches, a gradient and a product each


@pytest.mark.parametrize(
    ("settings", "given", "message"),
    [
        ({"estimator": "gauss_newton"}, {}, "finds no class logits.*use estimator='hutchinson'"),
        ({"estimator": "empirical_fisher"}, {}, "needs the number of predictions.*pass size="),
        ({"estimator": "finite_difference"}, {"size": 2}, "computes every loss a second time; pass size="),
        ({"batch_fraction": 0.5}, {"size": 2}, "batch_fraction=0.5 may end inside a microbatch; pass size="),
        ({"batch_fraction": 0.5}, {"size": 2, "batch_size": 2}, "may end inside a microbatch.*again="),
    ],
)
def test_what_is_missing_is_said_in_one_line(settings, given, message):
    w = nn.Parameter(torch.ones(2))
    curvature = LazyCurvature(**settings)
    estimation = Estimation(curvature, [w], step=0)
    with pytest.raises(ValueError, match=message) as error:
        estimation.attach((w**2).sum(), **given)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ESTIMATORS)
def test_only_hutchinson_builds_a_second_order_graph(name, monkeypatch):
    created = []
    grad = torch.autograd.grad

    def watched(*args, create_graph=False, **kwargs):
        created.append(create_graph)
        return grad(*args, create_graph=create_graph, **kwargs)

    monkeypatch.setattr(torch.autograd, "grad", watched)
    refresh(Problem(samples=12), name, [5, 5, 2], batch_fraction=0.5)
    assert any(created) == LazyCurvature(estimator=name).needs.second_order == (name == "hutchinson")


def test_the_first_estimate_by_differences_warns_of_kinks():
    w = nn.Parameter(torch.tensor([1.0, 2.0]))
    curvature = LazyCurvature(estimator="finite_difference")

    def estimate(function, look):
        estimation = Estimation(curvature, [w], step=0, look=look)

        def again(count, function=function, w=w):
            return contextlib.nullcontext(function(w).square().sum())

        estimation.attach(function(w).square().sum(), size=1, again=again).backward()

    with pytest.warns(UserWarning, match=r"this loss has kinks \(ReluBackward0\)") as caught:
        estimate(torch.relu, look=True)
    assert "\n" not in str(caught[0].message)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        estimate(torch.relu, look=False)
        curvature = LazyCurvature(estimator="finite_difference")
        estimate(torch.tanh, look=True)
