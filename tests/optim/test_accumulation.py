"""Gradient accumulation in a plain loop: the weight of a part of the batch, which `backward` takes."""

import contextlib

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from composer_sassha import SASSHA, SharpnessAwareOptimizer
from composer_sassha.curvature import ESTIMATORS, Evaluation, LazyCurvature
from composer_sassha.perturbations import GSAMPerturbation, SAMPerturbation


class Diagonal(nn.Module):
    """One weight for each logit, so that the Hessian's diagonal has no noise from its other entries."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.tensor([0.3, -0.2, 0.1], dtype=torch.float64))

    def forward(self, x):
        return x * self.w


def data(count=48):
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(count, 3, generator=generator, dtype=torch.float64)
    return x, torch.randint(3, (count,), generator=generator)


def estimate(parts, estimator, samples=1, fraction=1.0, perturbation=None):
    """Return the diagonal and the gradient of one step at lr 0, with the batch in parts of these sizes."""
    model, (x, y) = Diagonal(), data()
    rule = SASSHA(model.parameters(), lr=0.0, betas=(0.9, 0.0))
    curvature = LazyCurvature(1, estimator, samples, batch_fraction=fraction)
    optimizer = SharpnessAwareOptimizer(rule, perturbation, curvature=curvature, model=model)

    def closure():
        optimizer.zero_grad()
        total = 0.0
        for px, py in zip(x.split(parts), y.split(parts), strict=True):

            @contextlib.contextmanager
            def again(count, px=px, py=py):
                logits = model(px[:count])
                yield Evaluation(F.cross_entropy(logits, py[:count]), logits, py[:count])

            logits = model(px)
            loss, weight = F.cross_entropy(logits, py), len(px) / len(x)
            known = {"logits": logits, "labels": py, "size": len(px), "batch_size": len(x), "again": again}
            optimizer.backward(loss, weight, **known)
            total += weight * loss.detach()
        return total

    optimizer.step(closure)
    return rule.state[model.w]["exp_hessian"].clone(), model.w.grad.clone()


WHOLE, PARTS = [48], [20, 16, 12]


def assert_estimates(diagonal, parts, estimator, samples):
    """Compare with the Hessian of the mean loss over these parts, which for this model is Gauss-Newton's too.

    Within four standard deviations. Of Hutchinson's probes the variance in entry i is the sum of H_ij^2 over
    j != i, of B g_i^2 at drawn labels it is 2 H_ii^2, since g_i is nearly normal; H is that of a part.
    """
    x, y = (tensor[: sum(parts)].split(parts) for tensor in data())
    w = Diagonal().w.detach()
    expected, variance = 0, 0
    for px, py in zip(x, y, strict=True):
        hessian = torch.func.hessian(lambda w, px=px, py=py: F.cross_entropy(px * w, py))(w)
        weight, h = len(px) / sum(parts), hessian.diagonal()
        expected = expected + weight * h
        spread = 2 * h**2 if estimator == "gauss_newton" else (hessian**2).sum(1) - h**2
        variance = variance + weight**2 * spread / samples
    assert ((diagonal - expected).abs() < 4 * variance.sqrt()).all()


@pytest.mark.parametrize("perturbation", [None, SAMPerturbation(0.1), GSAMPerturbation()], ids=repr)
def test_weighted_parts_have_the_gradient_of_the_whole_batch(perturbation):
    _, whole = estimate(WHOLE, "hutchinson", perturbation=perturbation)
    _, parts = estimate(PARTS, "hutchinson", perturbation=perturbation)
    torch.testing.assert_close(parts, whole, rtol=1e-12, atol=0)


STOCHASTIC = [name for name in ESTIMATORS if name != "empirical_fisher"]


@pytest.mark.parametrize("estimator", STOCHASTIC)
@pytest.mark.parametrize("sizes", [WHOLE, PARTS], ids=len)
def test_weighted_parts_estimate_the_diagonal_of_the_whole_batch(estimator, sizes):
    diagonal, _ = estimate(sizes, estimator, samples=400)
    assert_estimates(diagonal, sizes, estimator, samples=400)


@pytest.mark.parametrize(("fraction", "first"), [(1.0, 48), (0.5, 24)])
def test_weighted_parts_give_the_empirical_fisher_of_the_whole(fraction, first):
    model, (x, y) = Diagonal(), data()
    (g,) = torch.autograd.grad(F.cross_entropy(model(x[:first]), y[:first]), model.w)
    for sizes in (WHOLE, PARTS):
        diagonal, _ = estimate(sizes, "empirical_fisher", fraction=fraction)
        torch.testing.assert_close(diagonal, first * g * g, rtol=1e-12, atol=0)


@pytest.mark.parametrize("estimator", STOCHASTIC)
def test_a_fraction_of_weighted_parts_estimates_on_the_first_samples(estimator):
    # Half of the batch is the whole first part and four samples of the second.
    diagonal, gradient = estimate(PARTS, estimator, samples=200, fraction=0.5)
    assert_estimates(diagonal, [20, 4], estimator, samples=200)
    torch.testing.assert_close(gradient, estimate(WHOLE, estimator)[1], rtol=1e-12, atol=0)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_a_loss_that_was_divided_is_noticed(estimator, recwarn):
    model, (x, y) = Diagonal(), data()
    rule = SASSHA(model.parameters(), lr=0.0)
    optimizer = SharpnessAwareOptimizer(rule, curvature=LazyCurvature(1, estimator), model=model)

    def closure():
        optimizer.zero_grad()
        for px, py in zip(x.split([24, 24]), y.split([24, 24]), strict=True):

            @contextlib.contextmanager
            def again(count, px=px, py=py):
                yield F.cross_entropy(model(px[:count]), py[:count])

            logits = model(px)
            loss = F.cross_entropy(logits, py) / 2
            optimizer.backward(loss, logits=logits, labels=py, size=len(px), again=again)
        return 0.0

    optimizer.step(closure)
    optimizer.step(closure)
    said = [str(warning.message) for warning in recwarn]
    # Hutchinson's is right so: it differentiates the loss that it is given.
    assert len(said) == (0 if estimator == "hutchinson" else 1)
    assert all("optimizer.backward(loss, 1 / 2)" in message for message in said)
