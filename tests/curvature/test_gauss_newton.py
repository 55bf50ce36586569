"""The Gauss-Newton-Bartlett estimator against the explicit Gauss-Newton matrix."""

import itertools
import math

import pytest
import torch

from composer_sassha.curvature import gauss_newton, gauss_newton_diagonal
from tests.curvature.problems import Problem, flat


def estimate(problem, keys, labels=None):
    labels = problem.y if labels is None else labels
    return flat(gauss_newton_diagonal(problem.logits(), labels, problem.params, keys))


@pytest.mark.parametrize("ignored", [[], [1]])
def test_its_mean_over_all_labels_is_the_gauss_newton_diagonal(ignored, monkeypatch):
    problem = Problem(samples=3, classes=2)
    counted = [i for i in range(3) if i not in ignored]
    labels = problem.y.clone()
    labels[ignored] = -100
    p = problem.logits().detach().softmax(dim=1)
    mean = torch.zeros_like(flat(problem.params))
    for drawn in itertools.product(range(2), repeat=3):
        monkeypatch.setattr(gauss_newton, "draw_labels", lambda *_, drawn=drawn: torch.tensor(drawn))
        probability = math.prod(p[i, c].item() for i, c in enumerate(drawn))
        mean += probability * estimate(problem, [(0,)], labels)
    torch.testing.assert_close(mean, problem.gauss_newton(counted).diagonal(), rtol=1e-12, atol=1e-14)


def test_labels_are_drawn_with_the_models_probabilities():
    logits = torch.tensor([[0.0, 1.0, -2.0, 3.0], [0.5, 0.5, 0.5, -9.0]], dtype=torch.float64)
    p = logits.softmax(dim=1)
    draws = 4000
    drawn = torch.stack([gauss_newton.draw_labels(p, (3, k)) for k in range(draws)])
    frequency = torch.stack([(drawn == c).double().mean(dim=0) for c in range(4)], dim=1)
    # Bernstein's inequality for the mean of variables in [0, 1], and a union bound over the eight entries:
    # fails by chance with probability at most 1e-9.
    log_term = math.log(2 * p.numel() / 1e-9)
    bound = (2 * p * (1 - p) * log_term / draws).sqrt() + 2 * log_term / (3 * draws)
    assert ((frequency - p).abs() <= bound).all()
    assert (bound < 0.08).all()  # the bound says something


def test_draws_are_determined_by_their_key_and_leave_the_global_generator_alone():
    problem = Problem()
    state = torch.get_rng_state()
    first = estimate(problem, [(4, 2)])
    assert torch.equal(first, estimate(problem, [(4, 2)]))
    assert not torch.equal(first, estimate(problem, [(4, 3)]))
    assert torch.equal(state, torch.get_rng_state())


def test_several_samples_are_the_mean_of_single_ones():
    problem = Problem()
    keys = [(1, k) for k in range(3)]
    singles = torch.stack([estimate(problem, [key]) for key in keys]).mean(dim=0)
    torch.testing.assert_close(estimate(problem, keys), singles, rtol=1e-13, atol=1e-15)


def test_predictions_in_further_dimensions_and_probabilities_as_labels():
    # Eight predictions are the same whether they come as [8, 3] or as [4, 3, 2].
    problem = Problem(samples=8)
    monkey = torch.tensor([0, 1, 2, 2, 1, 0, 0, 1])

    def arranged():
        return problem.logits().view(4, 2, 3).movedim(-1, 1)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gauss_newton, "draw_labels", lambda *_: monkey.clone())
        expected = estimate(problem, [(0,)])
        soft = torch.full((8, 3), 1 / 3, dtype=torch.float64)
        assert torch.equal(estimate(problem, [(0,)], soft), expected)
        patch.setattr(gauss_newton, "draw_labels", lambda *_: monkey.view(4, 2).clone())
        spread = gauss_newton_diagonal(arranged(), problem.y.view(4, 2), problem.params, [(0,)])
        torch.testing.assert_close(flat(spread), expected, rtol=1e-12, atol=1e-15)
    drawn = gauss_newton.draw_labels(arranged().detach().softmax(dim=1), (0,))
    assert drawn.shape == (4, 2)


def test_a_parameter_that_the_logits_do_not_use_has_no_curvature():
    problem = Problem()
    other = torch.nn.Parameter(torch.ones(2))
    *_, diagonal = gauss_newton_diagonal(problem.logits(), problem.y, [*problem.params, other], [(0,)])
    assert diagonal.tolist() == [0, 0]


def test_logits_that_are_not_finite_give_an_estimate_that_is_not():
    problem = Problem()
    with torch.no_grad():
        problem.params[0].fill_(torch.nan)
    assert estimate(problem, [(0,)]).isnan().any()


def test_half_precision_is_gathered_in_float32():
    w = torch.zeros(2, dtype=torch.bfloat16, requires_grad=True)
    (diagonal,) = gauss_newton_diagonal(w.expand(4, 2), torch.zeros(4, dtype=int), [w], [(0,), (1,)])
    assert diagonal.dtype == torch.float32


def test_labels_that_do_not_fit_are_refused():
    problem = Problem()
    with pytest.raises(ValueError, match=r"labels of shape \(7,\) do not fit logits of shape \(8, 3\)"):
        estimate(problem, [(0,)], problem.y[:7])


@pytest.mark.parametrize("ignored", [-100, -1, 3, 255])
def test_what_is_no_class_is_no_prediction(ignored):
    torch.manual_seed(0)
    x, labels = torch.randn(20, 4), torch.randint(3, (20,))
    labels[::2] = ignored

    def diagonal(x, labels):
        w = torch.zeros(4, 3, requires_grad=True)
        return gauss_newton_diagonal(x @ w, labels, [w], keys=[(k,) for k in range(4000)])[0]

    # The mean over the ten that are classes of x^2 p (1 - p), p = 1/3. A square that is nearly chi-squared
    # varies by sqrt(2 / 4000) over the draws, and this allows for four times that.
    expected = (x[1::2] ** 2).mean(0, keepdim=True).T.expand(4, 3) * 2 / 9
    torch.testing.assert_close(diagonal(x, labels), expected, rtol=0.09, atol=0)
