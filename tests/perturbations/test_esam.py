"""ESAM's displacement, and its choice of samples."""

import math

import pytest
import torch

from composer_sassha import ESAM
from composer_sassha.perturbations import ESAMPerturbation, SAMPerturbation
from composer_sassha.perturbations.esam import bernoulli, most_sensitive
from tests.helpers import assert_same
from tests.perturbations.points import DTYPES, assert_displaces, displace, norm, tensors


@pytest.mark.parametrize("dtypes", DTYPES.values(), ids=DTYPES)
def test_displaces_a_share_by_sams_displacement_over_that_share(dtypes):
    masks = bernoulli(tensors(2), 0.6, (4, 7, 1))
    assert {0.0, 1.0} == {entry for mask in masks for entry in mask.flatten().tolist()}
    metrics = assert_displaces(
        ESAMPerturbation(rho=0.7, beta=0.6, seed=4),
        lambda w, g: [0.7 / 0.6 * mask * g_i / norm(g) for mask, g_i in zip(masks, g, strict=True)],
        dtypes,
        step=7,
        rank=1,
    )
    # of the whole gradient, not of what the mask leaves
    assert metrics == {"rho": 0.7, "grad_norm": pytest.approx(norm(tensors(2, dtypes)), rel=1e-6)}


def test_with_all_weights_it_is_sam():
    ours, theirs = tensors(1), tensors(1)
    displace(ESAMPerturbation(0.5, beta=1), ours, tensors(2))
    displace(SAMPerturbation(0.5), theirs, tensors(2))
    assert_same(ours, theirs)


@pytest.mark.parametrize("beta", [0.05, 0.5, 0.9])
def test_the_share_is_beta(beta):
    masks = bernoulli([torch.zeros(300, 100), torch.zeros(10_000)], beta, (0, 3, 0))
    kept = torch.cat([mask.flatten() for mask in masks])
    assert set(kept.tolist()) == {0.0, 1.0}
    # Five standard errors of the mean of Bernoulli numbers
    assert abs(kept.mean().item() - beta) <= 5 * math.sqrt(beta * (1 - beta) / kept.numel())


def test_the_mean_over_steps_is_sams_displacement():
    g, rho, beta, draws = tensors(2), 0.5, 0.6, 900
    total = [torch.zeros_like(g_i) for g_i in g]
    for step in range(draws):
        e = [torch.zeros_like(g_i) for g_i in g]
        displace(ESAMPerturbation(rho, beta), e, [g_i.clone() for g_i in g], step=step)
        torch._foreach_add_(total, e)
    for sum_of_e, g_i in zip(total, g, strict=True):
        sam = rho * g_i / norm(g)
        # Five standard errors: an entry is sam / beta times a Bernoulli number.
        bound = 5 * sam.abs() / beta * math.sqrt(beta * (1 - beta) / draws)
        assert ((sum_of_e / draws - sam).abs() <= bound).all()


def displacement(seed=0, step=0, rank=0):
    w = torch.zeros(1000)
    displace(ESAMPerturbation(seed=seed), [w], [torch.ones(1000)], step=step, rank=rank)
    return w


def test_seed_step_and_rank_determine_the_draw():
    assert torch.equal(displacement(3, 5, 1), displacement(3, 5, 1))
    others = [displacement(4, 5, 1), displacement(3, 6, 1), displacement(3, 5, 2), displacement(5, 3, 1)]
    assert not any(torch.equal(displacement(3, 5, 1), other) for other in others)


def test_tensors_draw_independently_and_leave_the_global_generator_alone():
    before = torch.get_rng_state()
    first, second = bernoulli([torch.zeros(1000), torch.zeros(1000)], 0.5, (0, 0, 0))
    assert not torch.equal(first, second)
    assert torch.equal(torch.get_rng_state(), before)


def test_the_samples_whose_loss_rises_most_in_order():
    before = torch.tensor([9.0, 0.0, 5.0, 1.0, 0.0])
    after = torch.tensor([9.5, 3.0, 1.0, 3.0, -1.0])  # they rise by 0.5, 3, -4, 2, -1
    assert most_sensitive(after - before, 0.2).tolist() == [1]
    assert most_sensitive(after - before, 0.4).tolist() == [1, 3]
    assert most_sensitive(after - before, 0.6).tolist() == [0, 1, 3]
    assert most_sensitive(after - before, 0.8).tolist() == [0, 1, 3, 4]
    assert most_sensitive(after - before, 1).tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(("gamma", "count"), [(1e-9, 1), (0.2, 1), (0.21, 2), (0.5, 3), (0.81, 5), (1.0, 5)])
def test_the_share_is_rounded_up_to_whole_samples(gamma, count):
    assert len(most_sensitive(torch.arange(5.0), gamma)) == count


def test_of_equal_rises_as_many_as_are_asked_for():
    chosen = most_sensitive(torch.tensor([1.0, 0.0, 1.0, 1.0, 0.0, 1.0]), 0.5).tolist()
    assert len(set(chosen)) == 3 and chosen == sorted(chosen) and set(chosen) <= {0, 2, 3, 5}


@pytest.mark.parametrize("gamma", [0, 0.0, -0.5, 1.5, math.nan, "x", True])
def test_a_bad_share_of_samples_is_refused(gamma):
    with pytest.raises((ValueError, TypeError)) as error:
        ESAM(gamma=gamma)
    assert str(error.value).startswith(f"ESAM: gamma={gamma!r} is not allowed") and "\n" not in str(
        error.value
    )
