"""The equations of the predictions, and what they are made of."""

import os
from collections import Counter
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from composer.models import ComposerClassifier
from torch import nn

from composer_sassha import GSAM, MSAM, SAM, LazyHessian, LookSAM, MSassha, Sassha
from composer_sassha.benchmark import plan, plan_timing
from composer_sassha.benchmark.collectives import Collective, traffic
from composer_sassha.benchmark.link import Link
from composer_sassha.benchmark.plan_timing import TimedMethod
from composer_sassha.benchmark.prediction import exposed, predict
from composer_sassha.benchmark.selection import chosen_recipes
from composer_sassha.benchmark.steps import Kind, Timing, schedule
from tests.helpers import network, trainer
from tests.methods import sassha, sgd


def test_an_all_reduce_takes_the_shorter_of_the_two_ways() -> None:
    link = Link(bandwidth=100.0, latency=0.5)
    assert link.seconds(400, ranks=1) == 0
    assert link.seconds(400, ranks=2) == 2 * (0.5 + 2)
    assert link.seconds(400, ranks=4) == 6 * (0.5 + 1)  # around a ring: 2 * 2 * (0.5 + 4) through a tree
    assert link.seconds(4, ranks=4) == pytest.approx(4 * (0.5 + 0.04))  # 6 * (0.5 + 0.01) around a ring


@pytest.mark.parametrize(
    ("buckets", "backward", "expected"),
    [
        ([600], 0.0, 6.0),
        ([600], 60.0, 6.0),  # it is full only when the backward pass has ended
        ([100, 200, 300], 0.0, 6.0),
        ([100, 200, 300], 1.0, 6.0 + 1 / 6 - 1),  # all of it waits for the first bucket
        ([100, 200, 300], 6.0, 3.0),  # full at 1, 3 and 6, sent by 2, 5 and 9
        ([100, 200, 300], 600.0, 3.0),  # the last is sent when it has ended
        ([300, 200, 100], 6.0, 3.0),  # full at 3, 5 and 6, sent by 6, 8 and 9
    ],
)
def test_buckets_travel_one_after_another_as_they_fill(
    buckets: list[int], backward: float, expected: float
) -> None:
    link = Link(bandwidth=100.0, latency=0.0)
    assert exposed(buckets, backward, link, ranks=2) == pytest.approx(expected)


def test_a_prediction_by_hand() -> None:
    ordinary, refresh = Kind(perturbs=True), Kind(perturbs=True, refreshes=True)
    timings = {ordinary: Timing(10.0, backward=4.0), refresh: Timing(step=30.0, backward=0.5)}
    moved = [Collective("batch size", 8), Collective("gradient", 100), Collective("gradient", 300)]
    collectives = {ordinary: moved, refresh: [*moved, Collective("Hessian", 400)]}
    kinds, link = Counter({ordinary: 3, refresh: 1}), Link(bandwidth=100.0, latency=0.25)

    found = predict(timings, collectives, kinds, link, ranks=2)
    # T: 0.58, 1.5, 3.5 and 4.5. The buckets are full at 1 and 4, and sent by 2.5 and 7.5: 3.5 after its end;
    # and on a refresh at 0.125 and 0.5, and sent by 1.625 and 5.125: 4.625 after it.
    assert found.alone == pytest.approx((3 * 10 + 30) / 4)
    assert found.size == pytest.approx((4 * 408 + 400) / 4)
    assert found.collectives == 3.25
    assert found.communication == pytest.approx(5.58 + 4.5 / 4)
    assert found.waiting == pytest.approx((3 * (0.58 + 3.5) + 0.58 + 4.625 + 4.5) / 4)
    assert found.step == found.alone + found.waiting

    waited = predict(timings, collectives, kinds, link, ranks=2, overlap=False)
    assert waited.waiting == waited.communication == pytest.approx(found.communication)
    one = predict(timings, collectives, kinds, link, ranks=1)
    assert one.step == one.alone == found.alone
    assert one.size == one.collectives == one.communication == 0


def test_each_gradient_of_a_synchronized_ascent_overlaps() -> None:
    kinds, link = Counter([Kind(True)]), Link(bandwidth=100.0, latency=0.0)
    moved = [Collective(f"{which}gradient", size) for which in ("ascent ", "") for size in (300, 100)]
    timings = {Kind(True): Timing(step=20.0, backward=4.0)}
    assert predict(timings, {Kind(True): moved}, kinds, link, ranks=2).waiting == pytest.approx(2 * 3)


def test_two_ranks_are_timed_alone_and_then_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """Alone on their parts of the batch; each time it is the slower rank that counts."""
    asked = []

    def timed(recipes: Mapping[str, Any], steps: int) -> dict[str, TimedMethod]:
        asked.append((os.environ.get("WORLD_SIZE"), recipes["sgd"].data.batch_size, steps))
        timings = {Kind(): Timing(0.010 * len(asked))}
        return {
            "sgd": TimedMethod(timings, Counter([Kind()]), {Kind(): [Collective("gradient", 1000)]}, 1000)
        }

    def gathered(found: dict[str, dict[Kind, Timing]]) -> list[dict[str, dict[Kind, Timing]]]:
        return [found, {"sgd": {Kind(): Timing(1.5 * found["sgd"][Kind()].step)}}]

    monkeypatch.setenv("WORLD_SIZE", "2")
    # Another test may have left a process group, of one rank.
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: False)
    monkeypatch.setattr(plan, "time_methods", timed)
    monkeypatch.setattr(plan.dist, "initialize_dist", lambda device: None)
    monkeypatch.setattr(plan_timing.dist, "all_gather_object", gathered)
    lines = plan.plan_lines(chosen_recipes("digits", (), ["sgd"]), 2, Link(1e6, 0.0), steps=7)
    assert asked == [(None, 64, 7), ("2", 128, 7)]
    method, alone, _, _, communication, waiting, step, _, measured, _, off = lines[1].split()[-11:]
    # 1000 bytes take 1 ms; 16 of 30 ms are predicted.
    assert (method, alone, communication, waiting) == ("sgd", "15.00", "1.00", "1.00")
    assert (step, measured, off) == ("16.00", "30.00", "+0%")


# What is looked at


@pytest.mark.parametrize(
    ("algorithms", "expected"),
    [
        ([], {Kind(): 1}),
        ([SAM(0.1)], {Kind(True): 1}),
        ([SAM(0.1, interval=3)], {Kind(True): 1, Kind(): 2}),
        ([MSAM(0.1)], {Kind(True): 1}),
        ([LookSAM(0.1, interval=5)], {Kind(True): 1, Kind(): 4}),
    ],
)
def test_the_kinds_of_steps_without_a_hessian(algorithms: list, expected: dict[Kind, int]) -> None:
    run = trainer(sgd, algorithms)
    assert schedule(run.state.optimizers[0]) == expected
    run.close()


@pytest.mark.parametrize(
    ("algorithms", "expected"),
    [
        ([LazyHessian(4)], {Kind(False, True): 1, Kind(): 3}),
        ([Sassha(0.1)], {Kind(True, True): 1, Kind(True): 9}),
        (
            [SAM(0.1, interval=2), LazyHessian(3)],
            {Kind(True, True): 1, Kind(True): 2, Kind(False, True): 1, Kind(): 2},
        ),
        ([MSassha(0.1, interval=2, hessian_interval=2)], {Kind(True, True): 1, Kind(): 1}),
    ],
)
def test_the_kinds_of_steps_with_a_hessian(algorithms: list, expected: dict[Kind, int]) -> None:
    run = trainer(sassha, algorithms)
    assert schedule(run.state.optimizers[0]) == expected
    run.close()


def test_only_trainable_parameters_of_the_optimizer_count() -> None:
    """DDP sends every gradient of the model; a mixture has those of the optimizer's parameters."""
    model = ComposerClassifier(
        nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 3), nn.Linear(3, 2)), num_classes=2
    )
    frozen, apart, ours = model.module
    frozen.requires_grad_(False)
    run = trainer(lambda _: sgd([*frozen.parameters(), *ours.parameters()]), [GSAM(0.1)], model=model)
    (optimizer,) = run.state.optimizers
    mixed, plain = (
        {c.purpose: c.size for c in traffic(optimizer, model, kind)} for kind in (Kind(True), Kind(False))
    )
    numbers = sum(p.numel() for p in ours.parameters())
    assert mixed["update"] == 4 * (numbers + 2) and "gradient" not in mixed
    assert plain["gradient"] == 4 * (numbers + sum(p.numel() for p in apart.parameters()))
    run.close()


def test_bfloat16_gradients_travel_so_and_are_mixed_in_float32() -> None:
    model = network().to(torch.bfloat16)
    run = trainer(sgd, [GSAM(0.1)], model=model)
    (optimizer,) = run.state.optimizers
    numbers, tensors = sum(p.numel() for p in model.parameters()), len([*model.parameters()])
    assert Collective("gradient", 2 * numbers) in traffic(optimizer, model, Kind())
    assert Collective("update", 4 * (numbers + tensors)) in traffic(optimizer, model, Kind(True))
    run.close()
