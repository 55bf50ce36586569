"""Write, read and summarize results.json, what a finished run leaves behind."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from statistics import median
from typing import Any

from composer import State
from composer.utils import dist

from composer_sassha.recipes.config import Recipe
from composer_sassha.recipes.files import write_atomically
from composer_sassha.recipes.metrics import metrics_of, number
from composer_sassha.recipes.run_log import RunLog

_FILE = "results.json"


def write_results(recipe: Recipe, state: State, log: RunLog) -> dict[str, Any]:
    """Write the results of a run into its folder and return them."""
    _, measured = log.heldout()[-1]
    results = {
        "recipe": recipe.name,
        "method": recipe.method,
        "seed": recipe.seed,
        **measured,
        "metrics": [metric.torchmetric for metric in log.metrics],  # the first one ranks the methods
        "heldout": log.heldout_label,
        "reported": recipe.reported,
        "seconds": log.seconds(state.timestamp),
        "seconds_per_step": log.seconds_per_step(),
        "processor_seconds_per_step": log.seconds_per_step("processor_seconds"),
        "steps": state.timestamp.batch.value,
        "epochs": state.timestamp.epoch.value,
        "parameters": sum(p.numel() for p in state.model.parameters()),
        "world_size": dist.get_world_size(),
        "device": state.device.name,
    }
    write_atomically(recipe.folder / _FILE, json.dumps(results, indent=2) + "\n")
    return results


def read_results(path: Path) -> dict[str, Any] | None:
    """Read a results.json; None if `write_results` did not write it or it is damaged."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return found if {"loss", "seconds_per_step", "world_size", "device"} <= found.keys() else None
    except (OSError, ValueError, AttributeError):
        return None


def summary(recipe: Recipe, results: dict[str, Any]) -> str:
    """Return the lines for the console, with the step time relative to the baseline's if that is known."""
    heldout, loss, metrics = results["heldout"], results["loss"], metrics_of(results)
    measured = (f"{heldout} {metric.text(number(results[metric.name]))}" for metric in metrics)
    unit = " %" if metrics[0].percent else ""
    lines = [
        f"{recipe.name} {recipe.method} seed {recipe.seed}: {', '.join(measured)}"
        + (f" (reported: {recipe.reported}{unit})" if recipe.reported is not None else ""),
        f"trained for {results['seconds']:.1f} s, {results['steps']} steps, "
        f"{results['seconds_per_step']:.4f} s per step{_relative_to_baseline(recipe, results)}",
        f"run folder: {recipe.folder}",
    ]
    if loss is None:
        lines.append("the training diverged: its loss is not finite; try a smaller learning rate")
    return "\n".join(lines)


def _relative_to_baseline(recipe: Recipe, results: dict[str, Any]) -> str:
    if recipe.baseline in (None, recipe.method):
        return ""
    paths = recipe.folder.parents[1].glob(f"{recipe.baseline}/seed*/{_FILE}")
    runs = [found for path in paths if (found := read_results(path)) is not None]
    same = [r for r in runs if all(r[key] == results[key] for key in ("world_size", "device"))]
    clock = step_clock([results, *same])
    return (
        f" ({results[clock] / median(r[clock] for r in same):.2f} times {recipe.baseline}'s)" if same else ""
    )


def step_clock(results: Iterable[Mapping[str, Any]]) -> str:
    """Return the key of results.json by which step times compare between these runs.

    That is the processor's time if all are single processes on a CPU, as other programs do not lengthen it,
    and the wall time otherwise.

    >>> run = {"device": "cpu", "world_size": 1, "seconds_per_step": 0.2, "processor_seconds_per_step": 0.1}
    >>> step_clock([run]), step_clock([run, run | {"world_size": 2}])
    ('processor_seconds_per_step', 'seconds_per_step')
    """
    alone = all(
        (run["device"], run["world_size"]) == ("cpu", 1) and run.get("processor_seconds_per_step") is not None
        for run in results
    )
    return "processor_seconds_per_step" if alone else "seconds_per_step"
