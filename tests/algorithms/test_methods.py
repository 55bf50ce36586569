"""What every method of the table owes its users through the real Trainer.

Each method trains once, and several tests look at that run.
"""

import weakref
from collections import Counter
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from composer.core import Event
from composer.loggers import InMemoryLogger
from composer.optim import CosineAnnealingWithWarmupScheduler
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from composer_sassha import SASSHA, Sassha
from tests.helpers import (
    PASS_EVENTS,
    Injected,
    Spy,
    assert_same,
    copied,
    digits,
    digits_network,
    everything,
    images,
    method_trainer,
    network,
)
from tests.methods import METHODS, MORE, NAMED, Method, each_method, rows

# The tests share the runs of one process.
pytestmark = pytest.mark.xdist_group("methods")

# A batch in mid-epoch that every method of the table perturbs and refreshes in.
REFRESH = 12
# The last epoch: it covers the border between two epochs, perturbed and unperturbed steps, and those before
# and after a refresh.
RESUMED = range(10, 14)


def build(method: Method, **kwargs: Any) -> Any:
    """Three epochs of five batches, each in two microbatches of unequal size, with dropout and BatchNorm."""
    model = digits_network()
    model.module.insert(3, nn.Dropout(0.2))
    return method_trainer(
        method,
        model=model,
        dataset=digits(),
        batch_size=32,
        device_train_microbatch_size=24,
        max_duration="3ep",
        schedulers=CosineAnnealingWithWarmupScheduler("2ba"),
        eval_dataloader=DataLoader(digits(), batch_size=160),
        **kwargs,
    )


@dataclass
class Whole:
    """An uninterrupted run: its end, its checkpoints, and observations on the way."""

    folder: Path
    end: Any = None
    losses: list[float] = field(default_factory=list)
    graphs: Counter[int] = field(default_factory=Counter)
    """The number of second-order graphs, by batch."""
    looked: dict[Event, bool] = field(default_factory=dict)
    """Whether the weights at an event between two steps were always those after the first one."""

    def checkpoint(self, batch: int) -> str:
        return str(self.folder / f"ba{batch}.pt")


def train_whole(method: Method, folder: Path) -> Whole:
    whole, batch, left = Whole(folder), 0, None
    grad, backward = torch.autograd.grad, torch.Tensor.backward

    def counted(function):
        def call(*args, create_graph=False, **kwargs):
            whole.graphs[batch] += bool(create_graph)
            return function(*args, create_graph=create_graph, **kwargs)

        return call

    def look(event, state, passes):
        nonlocal batch, left
        batch = int(state.timestamp.batch)
        if event == Event.BATCH_END:
            left = copied(state.model.state_dict())
        elif left and event in (Event.BATCH_START, Event.EVAL_START, Event.BATCH_CHECKPOINT):
            now = state.model.state_dict()
            same = all(torch.equal(tensor, now[name]) for name, tensor in left.items())
            whole.looked[event] = same and whole.looked.get(event, True)

    log = InMemoryLogger()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.autograd, "grad", counted(grad))
        patch.setattr(torch.Tensor, "backward", counted(backward))
        run = build(
            method,
            loggers=[log],
            callbacks=[Spy(look)],
            save_folder=str(folder),
            save_filename="ba{batch}.pt",
            save_interval=lambda state, _: state.timestamp.batch in RESUMED,
        )
        run.fit()
    whole.end = everything(run), copied(run.state.train_metric_values)
    whole.losses = [value for _, value in log.data["loss/train/total"]]
    run.close()
    return whole


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Train each method once and return its run."""

    @cache
    def of(name):
        return train_whole(NAMED[name], tmp_path_factory.mktemp(name))

    return lambda method: of(method.name)


@each_method
def test_trains_the_digits(method, whole):
    losses = whole(method).losses
    assert len(losses) == 15 and sum(losses[-4:]) < 0.6 * sum(losses[:4])


@each_method
def test_differentiates_twice_on_refresh_steps_only(method, whole):
    graphs = whole(method).graphs
    refreshing = [batch for batch in range(4) if graphs[batch]]
    assert len(refreshing) == method.second_order
    # One graph per microbatch, of the last pass alone.
    assert all(graphs[batch] <= 2 for batch in refreshing)


@each_method
def test_evaluates_and_saves_at_w(method, whole):
    expected = (Event.BATCH_START, Event.EVAL_START, Event.BATCH_CHECKPOINT)
    assert whole(method).looked == dict.fromkeys(expected, True)


def end_of(run):
    run.fit()
    end = everything(run), copied(run.state.train_metric_values)
    run.close()
    return end


@each_method
def test_resumes_bit_for_bit(method, whole):
    for batch in RESUMED if method in MORE else [11]:
        resumed = build(method, load_path=whole(method).checkpoint(batch))
        assert_same(whole(method).end, end_of(resumed), f"resumed from batch {batch}")


class Failures:
    """Raises in each of the first tries of one step, at one (pass, place) after the other.

    A place is an event, or inside forward or backward: of the second microbatch, where it has microbatches.
    """

    def __init__(self, places):
        self.left, self.here, self.calls = list(places), False, Counter()
        self.spy = Spy(self.on_event)

    def install(self, run):
        net, train_batch = run.state.model.module, run._train_batch
        net[5].register_forward_hook(lambda *_: self.reach("forward"))
        net[0].weight.register_hook(lambda _: self.reach("backward"))

        def retried(use_grad_scaling):
            before, metrics, batch = everything(run), run.state.train_metrics, run.state.batch
            while True:
                self.calls.clear()
                try:
                    return train_batch(use_grad_scaling)
                except Injected:
                    assert_same(before, everything(run), f"after an exception in {self.left.pop(0)}")
                    assert run.state.train_metrics is metrics and run.state.batch is batch
                    assert all(metric._update_count == 0 for metric in metrics.values())

        run._train_batch = retried

    def on_event(self, event, state, passes):
        # `passes` counts from the start of the batch, not of the try.
        if event == Event.BEFORE_TRAIN_BATCH:
            self.calls["passes"] += 1
        self.here = state.timestamp.batch == REFRESH
        self.reach(event.value)

    def reach(self, place):
        key = (self.calls["passes"], place)
        self.calls[key] += 1
        once = place in ("before_train_batch", "after_train_batch")
        if self.here and self.left and self.left[0] == key and self.calls[key] == (1 if once else 2):
            raise Injected


EVERYWHERE = [*(event.value for event in PASS_EVENTS), "forward", "backward"]
WHERE_IT_HURTS = ["before_forward", "before_backward", "backward"]


@each_method
def test_survives_exceptions_in_a_step(method, whole):
    places = [(method.passes, place) for place in WHERE_IT_HURTS]
    if method.name in ("sam_sgd", "gsam_sgd", "sassha"):
        places = [(number, place) for number in (1, 2) for place in EVERYWHERE]
    failures = Failures(places)
    run = build(method, load_path=whole(method).checkpoint(REFRESH - 1), callbacks=[failures.spy])
    failures.install(run)
    assert_same(whole(method).end, end_of(run))
    assert not failures.left


# In bfloat16 a curvature may round to zero, which the rule divides by eps alone: a large one is needed.
BFLOAT16 = [
    NAMED["sam_sgd"],
    Method("sassha", lambda params: SASSHA(params, lr=0.05, eps=0.1), lambda: [Sassha(0.1)]),
]


@pytest.mark.parametrize("method", BFLOAT16, ids=str)
def test_trains_bfloat16_parameters_and_resumes_them(method, tmp_path):
    x, y = images().tensors

    def build(**kwargs):
        dataset = TensorDataset(x.bfloat16(), y)
        return method_trainer(
            method, model=network().bfloat16(), dataset=dataset, max_duration="6ep", **kwargs
        )

    log = InMemoryLogger()
    run = build(save_folder=str(tmp_path), save_interval="5ba", save_filename="ba{batch}.pt", loggers=[log])
    expected = end_of(run)
    assert_same(expected, end_of(build(load_path=str(tmp_path / "ba5.pt"))))
    losses = [value for _, value in log.data["loss/train/total"]]
    assert sum(losses[-4:]) < sum(losses[:4])


# Not ESAM, whose second pass may select many samples of one microbatch and few of another, nor the estimate
# on part of the batch, which is a larger part of the larger batch.
GATHERING = [m for m in METHODS if m.second_order and "esam" not in m.name and m.name != "sassha_on_part"]


@pytest.mark.parametrize("method", rows(GATHERING))
def test_the_memory_of_a_refresh_is_that_of_one_microbatch(method):
    def peak(batch_size, microbatch_size):
        """The largest number of elements saved for backward at one time."""
        live, most = 0, 0

        def release(count):
            nonlocal live
            live -= count

        def pack(tensor):
            nonlocal live, most
            saved = tensor.detach()
            live += saved.numel()
            most = max(most, live)
            weakref.finalize(saved, release, saved.numel())
            return saved

        run = method_trainer(
            method, max_duration="1ba", batch_size=batch_size, device_train_microbatch_size=microbatch_size
        )
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved):
            run.fit()
        run.close()
        return most

    assert peak(40, 10) <= 1.1 * peak(10, 10)
