"""Read and write sharpness.json, the measurements of the runs of a comparison."""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from composer_sassha.inspection.options import Options
from composer_sassha.recipes.errors import ConfigError
from composer_sassha.recipes.files import write_atomically

Found = dict[str, Any]


def earlier_record(path: Path, options: Options) -> Found | None:
    """Read what was measured before, if anything.

    Raises:
        ConfigError: it was measured with other options, or the file is damaged.
    """
    if not path.exists():
        return None
    found = read_record(path)
    for name, now in asdict(options).items():
        if (before := found["options"].get(name)) != now:
            raise ConfigError(
                f"{path}: was measured with another {name} ({before} there, {now} here); use the same, or "
                "move that file away"
            )
    return found


def read_record(path: Path) -> Found:
    """Read what was measured.

    Raises:
        ConfigError: the file is damaged.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        found["runs"], found["options"]["samples"], found["reference"], found["heldout"], found["metric"]
        return found
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path}: is damaged; delete it, and the same command measures again") from error


def write_record(path: Path, found: Found) -> None:
    """Write what was measured, as a whole or not at all."""
    write_atomically(path, json.dumps(without_nonfinite(found)) + "\n")


def without_nonfinite(tree: Any) -> Any:
    """Replace numbers that are not finite, which JSON does not have, by None."""
    if isinstance(tree, Mapping):
        return {key: without_nonfinite(value) for key, value in tree.items()}
    if isinstance(tree, list):
        return [without_nonfinite(value) for value in tree]
    return None if isinstance(tree, float) and not math.isfinite(tree) else tree


def by_method(found: Found) -> dict[str, list[Found]]:
    """Return the runs of each method, by seed."""
    methods: dict[str, list[Found]] = {}
    for run in sorted(found["runs"].values(), key=lambda run: run["seed"]):
        methods.setdefault(run["method"], []).append(run)
    order = [run["method"] for run in found["runs"].values()]
    return {method: methods[method] for method in dict.fromkeys(order)}


def values_of(runs: list[Found], name: str) -> list[float]:
    """Return a number of each run, where there is one."""
    found = [run["numbers"].get(name) for run in runs]
    return [value for value in found if value is not None]


def moments(values: list[float]) -> tuple[float | None, float | None]:
    """Return the mean and the sample's standard deviation; None where there are too few values."""
    mean = float(np.mean(values)) if values else None
    return mean, float(np.std(values, ddof=1)) if len(values) > 1 else None
