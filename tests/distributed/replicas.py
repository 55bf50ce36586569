"""Checks that replicas stay equal: undisturbed, under faults of one rank, and in a resumed run."""

import warnings
from functools import partial
from pathlib import Path
from typing import Any

import torch
from composer import Trainer
from composer.core import Algorithm, Event, State
from composer.loggers import Logger
from composer.utils import dist
from torch import nn

from tests.distributed.launch import run_checks, without_metrics
from tests.helpers import (
    Spy,
    assert_same,
    copied,
    everything,
    float16_on_cpu,
    images,
    method_trainer,
    network,
    trainer,
)
from tests.methods import METHODS, MORE, Method


def trains(method: Method, folder: Path, steps: int = 12) -> None:
    """Train on different data, along different perturbations: the replicas stay equal.

    A run that is resumed in mid-epoch, between two refreshes, ends as the uninterrupted one. The special rows
    are also resumed one batch earlier, as their intervals differ.
    """
    batches = (6, 7) if method in MORE else (7,)  # an epoch has four

    def due(state: State, event: Event) -> bool:
        return event == Event.BATCH_CHECKPOINT and state.timestamp.batch in batches

    def build(**kwargs: Any) -> Trainer:
        return worker_trainer(method, max_duration=f"{steps}ba", device_train_microbatch_size=7, **kwargs)

    run = build(save_folder=str(folder), save_interval=due, save_filename="ba{batch}.pt")
    run.fit()
    assert_replicas(run, steps)
    expected = everything(run)
    run.close()
    for batch in batches:
        resumed = build(load_path=str(folder / f"ba{batch}.pt"))
        assert resumed.state.timestamp.batch == batch
        resumed.fit()
        assert_same(expected, everything(resumed), f"rank {dist.get_global_rank()}, from batch {batch}")
        resumed.close()


def worker_trainer(method: Method, **kwargs: Any) -> Trainer:
    return method_trainer(method, **{"model": without_metrics(network()), "dataset": images(80), **kwargs})


def replicas(method: Method, steps: int) -> None:
    """Train on different data, along different perturbations: both ranks hold the same weights."""
    run = worker_trainer(method, max_duration=f"{steps}ba", device_train_microbatch_size=7)
    run.fit()
    assert_replicas(run, steps)
    run.close()


def assert_replicas(run: Trainer, steps: int) -> None:
    (optimizer,) = run.state.optimizers
    assert optimizer.steps_taken == steps
    norms = dist.all_gather_object(optimizer.metrics.get("grad_norm"))
    assert norms[0] is None or norms[0] != norms[1], "the ranks perturb along their own gradients"
    assert_equal_on_all_ranks([[*run.state.model.parameters()], optimizer.state_dict()])


def replicas_under_overflow(method: Method, steps: int) -> None:
    """In float16, one rank's gradient overflows now and then, in either pass: both skip, and stay equal."""

    def overflow(event: Event, state: State, passes: int) -> None:
        batch = int(state.timestamp.batch)
        due = (passes == 1 and batch % 7 == 3) or (passes == 2 and batch % 5 == 4)
        if event == Event.AFTER_BACKWARD and dist.get_global_rank() == 1 and due:
            next(state.model.parameters()).grad.fill_(torch.inf)

    with float16_on_cpu() as settings:
        run = worker_trainer(method, max_duration=f"{steps}ba", callbacks=[Spy(overflow)], **settings)
        run.fit()
    (optimizer,) = run.state.optimizers
    assert optimizer.skipped_steps > 0 and optimizer.steps_taken + optimizer.skipped_steps == steps
    assert_equal_on_all_ranks(
        [[*run.state.model.parameters()], optimizer.state_dict(), run.state.scaler.state_dict()]
    )
    run.close()


class Sometimes(nn.Module):
    """A layer that every rank leaves out at random."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.layer = nn.Linear(features, features)

    def forward(self, x):
        return x + self.layer(x) if torch.rand(()) < 0.6 else x


def replicas_without_gradients(method: Method, steps: int) -> None:
    """Leave a layer out at random: one rank, or both, has no gradient for it, other ones in each pass."""
    model = without_metrics(network())
    *layers, head = model.module
    model.module = nn.Sequential(*layers, Sometimes(head.in_features), head)
    run = trainer(
        method.optimizer,
        [*method.algorithms(), Unused()],
        model=model,
        dataset=images(80),
        max_duration=f"{steps}ba",
    )
    run.fit()
    (optimizer,) = run.state.optimizers
    assert optimizer.steps_taken == steps
    assert_equal_on_all_ranks([[*run.state.model.parameters()], optimizer.state_dict()])
    run.close()


class Unused(Algorithm):
    """Make DDP look for parameters that are not used."""

    find_unused_parameters = True

    def match(self, event: Event, state: State) -> bool:
        return False

    def apply(self, event: Event, state: State, logger: Logger) -> None:
        raise NotImplementedError


def assert_equal_on_all_ranks(tree: Any) -> None:
    mine = copied(tree)
    for other in dist.all_gather_object(mine):
        assert_same(mine, other)


# What may tear replicas apart, and the methods that it is tried on. Differences are refused in float16.
WHAT_KEEPS = {
    "replicas": replicas,
    "replicas_under_overflow": replicas_under_overflow,
    "replicas_without_gradients": replicas_without_gradients,
}

REPLICAS = [
    (check, method)
    for method in METHODS
    for check in WHAT_KEEPS
    if (check, method.name) != ("replicas_under_overflow", "sassha_difference")
]

FAULTS = [
    (check, name)
    for check in ("replicas_under_overflow", "replicas_without_gradients")
    for name in ("sam_sgd_every_2", "gsam_adamw", "looksam_sgd", "esam_sgd", "sassha", "msassha")
]

LONGER = ("looksam_adamw", "sassha_scheduled")


def long(out: Path, steps: int) -> None:
    """Run the checks of equal replicas, for every method and fault."""
    warnings.simplefilter("ignore")
    run_checks({f"{check}[{m}]": partial(WHAT_KEEPS[check], m, steps) for check, m in REPLICAS}, out)
