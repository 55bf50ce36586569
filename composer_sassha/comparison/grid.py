"""The grid of a comparison: a recipe's methods times seeds, and the state of the run folders."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from composer_sassha.recipes.config import Recipe, load_recipe, read_recipe
from composer_sassha.recipes.errors import ConfigError
from composer_sassha.recipes.folder import RunFolder
from composer_sassha.recipes.schema import lookup

_OWN_OPTIONS = {"method": "--methods", "seed": "--seeds"}


def load_grid(
    recipe: str, methods: Sequence[str] = (), seeds: Sequence[int] = (0, 1, 2), overrides: Sequence[str] = ()
) -> list[Recipe]:
    """Return the recipes of all runs: every seed of the first method, then of the second, and so on.

    Args:
        recipe: path, or name of a bundled recipe.
        methods: methods of the recipe; without any, all. A recipe without `methods` is one method.
        seeds: of every method.
        overrides: `key=value`, for all methods.

    Raises:
        ConfigError: a run is not possible.

    >>> [run.folder.as_posix() for run in load_grid("digits", ["sgd", "sam"], [0])]
    ['runs/digits/sgd/seed0', 'runs/digits/sam/seed0']
    """
    for override in overrides:
        if option := _OWN_OPTIONS.get(override.split("=")[0]):
            raise ConfigError(f"{override}: a comparison has several; choose them with {option}")
    _, rows = read_recipe(recipe)
    for method in methods:
        lookup(rows, method, "--methods")
    loaded = [load_recipe(recipe, [*overrides, f"method={method}"]) for method in methods or rows]
    if not loaded:
        raise ConfigError(f"{recipe}: its methods are empty; add at least one")
    return [replace(row, seed=seed) for row in loaded for seed in seeds]


@dataclass
class GridRun:
    """One run of the grid.

    Args:
        recipe: its settings.
        results: content of its results.json; None if it is not finished.
    """

    recipe: Recipe
    results: dict[str, Any] | None

    def __str__(self) -> str:
        return f"{self.recipe.method} seed {self.recipe.seed}"

    @property
    def state(self) -> str:
        """Return `finished`, `not begun`, or the number of steps so far."""
        if self.results is not None:
            return "finished"
        steps = sum("seconds" in record for record in self.records())
        return f"unfinished, {steps} steps" if steps else "not begun"

    def records(self) -> list[dict[str, Any]]:
        """Return the records of its metrics.jsonl; none if it is missing or damaged."""
        try:
            text = (self.recipe.folder / "metrics.jsonl").read_text(encoding="utf-8")
            return [json.loads(line) for line in text.splitlines()]
        except (OSError, ValueError):
            return []


def look(recipes: Sequence[Recipe]) -> list[GridRun]:
    """Read which of the runs are finished.

    Args:
        recipes: from `load_grid`.

    Raises:
        ConfigError: a run folder has other content, such as a run with other settings.
    """
    return [GridRun(recipe, RunFolder(recipe).earlier_results()) for recipe in recipes]


def report_folder(recipes: Sequence[Recipe]) -> Path:
    """Return the folder of the report: `<save_folder>/<recipe name>`."""
    return recipes[0].folder.parents[1]
