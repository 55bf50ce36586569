"""A plan: what a step of every method costs on several ranks, as lines to print."""

from collections.abc import Mapping

import torch
from composer.utils import dist, get_device

from composer_sassha.benchmark.link import Link, measured_link
from composer_sassha.benchmark.plan_timing import as_single_process, slowest_ranks, time_methods
from composer_sassha.benchmark.prediction import Prediction, predict
from composer_sassha.benchmark.selection import batch_size, with_batch_size
from composer_sassha.recipes.config import Recipe
from composer_sassha.recipes.errors import ConfigError
from composer_sassha.reporting.tables import Table


def plan_lines(recipes: Mapping[str, Recipe], ranks: int, link: Link | None, steps: int) -> list[str]:
    """Predict, measure if there are ranks to measure on, and return the lines to print.

    Args:
        recipes: by method; all with the same data.
        ranks: number of ranks that share a batch.
        link: between them; None measures the one between the processes that were started.
        steps: number of steps of each kind that each method takes.

    Raises:
        ConfigError: a method cannot be built, or the batch cannot be divided.
    """
    first = next(iter(recipes.values()))
    if first.cpu_threads is not None:
        torch.set_num_threads(first.cpu_threads)
    samples = _samples_per_rank(first, ranks)
    with as_single_process():
        alone = time_methods({m: with_batch_size(recipe, samples) for m, recipe in recipes.items()}, steps)
    several, on_gpu = dist.get_world_size() > 1, get_device(None).name == "gpu"
    if several:
        dist.initialize_dist(get_device(None))
        alone = slowest_ranks(alone)
    link = link or measured_link(next(iter(alone.values())).gradient)
    predictions = {
        method: predict(timed.timings, timed.traffic, timed.schedule, link, ranks, overlap=on_gpu)
        for method, timed in alone.items()
    }
    together = slowest_ranks(time_methods(recipes, steps)) if several else {}
    measured = {method: timed.step for method, timed in together.items()}
    baseline = next((m for m in recipes if m == first.baseline), next(iter(recipes)))
    device, how = "CPU", "all of it waited for, as CPUs compute or send"
    if on_gpu:
        device, how = "GPU", "that of gradients during the backward pass, as far as it can"
    return [
        f"{first.name} on {ranks} ranks of {samples} samples each, {link}; times in ms",
        _table(predictions, measured, baseline).plain(),
        f"alone: median of {steps} steps of each kind on one process, here, on a {device}.",
        f"communication: around a ring or, if that is faster, through a tree; {how}.",
        "Left out: loading data, ranks slower than others, DDP's own work, faster links within a machine.",
    ]


def _samples_per_rank(recipe: Recipe, ranks: int) -> int:
    size = batch_size(recipe)
    if size % ranks:
        raise ConfigError(
            f"data.batch_size={size}: cannot be divided by {ranks} ranks; change one of the two, such as "
            f"data.batch_size={max(1, round(size / ranks)) * ranks}"
        )
    return size // ranks


def _table(predictions: Mapping[str, Prediction], measured: Mapping[str, float], baseline: str) -> Table:
    """Return the table, which has columns for measured times only if there are such."""
    relative = f"/ {baseline}"
    head = ["method", "alone", "MB/step", "collectives", "communication", "waiting", "step", relative]
    rows: list[list[str]] = []
    for method, found in predictions.items():
        ratio = found.step / predictions[baseline].step
        milliseconds = [f"{1e3 * t:.2f}" for t in (found.communication, found.waiting, found.step)]
        row = [
            method,
            f"{1e3 * found.alone:.2f}",
            f"{1e-6 * found.size:.3f}",
            f"{found.collectives:.1f}",
            *milliseconds,
            f"{ratio:.2f}",
        ]
        if measured:
            true = measured[method] / measured[baseline]
            row += [f"{1e3 * measured[method]:.2f}", f"{true:.2f}", f"{ratio / true - 1:+.0%}"]
        rows.append(row)
    return Table(head + (["measured", relative, "off"] if measured else []), rows)
