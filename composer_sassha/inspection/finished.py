"""Finished runs on disk, which can be measured."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zipfile import is_zipfile

import torch

from composer_sassha.recipes.config import Recipe, load_recipe
from composer_sassha.recipes.errors import ConfigError
from composer_sassha.recipes.folder import LATEST
from composer_sassha.recipes.results import read_results


@dataclass
class Finished:
    """A finished run.

    Args:
        folder: its folder, which may have moved since its settings were written.
        recipe: its settings.
        results: content of its results.json.
        checkpoint: the newest one.
    """

    folder: Path
    recipe: Recipe
    results: dict[str, Any]
    checkpoint: Path

    def __str__(self) -> str:
        return f"{self.recipe.method}/seed{self.recipe.seed}"

    @property
    def version(self) -> list[Any]:
        """Return what differs if the run is trained again: name, size and time of the checkpoint."""
        status = self.checkpoint.stat()
        return [self.checkpoint.name, status.st_size, status.st_mtime_ns]

    def state(self) -> dict[str, torch.Tensor]:
        """Load the state of the model from the checkpoint."""
        try:
            return torch.load(self.checkpoint, map_location="cpu", weights_only=False)["state"]["model"]
        except Exception as error:  # unpickling a damaged or foreign file can raise any
            raise ConfigError(f"{self.checkpoint}: cannot be loaded ({error}); restore it") from error


def find_run(folder: Path, overrides: Sequence[str] = ()) -> Finished:
    """Find the results and the newest checkpoint of a run.

    Args:
        folder: with config.yaml, results.json and checkpoints/.
        overrides: `data.key=value`, for a data set that has moved.

    Raises:
        ConfigError: it is not a run, is not finished, or has no checkpoint.
    """
    config = folder / "config.yaml"
    if not config.is_file():
        there = "is not the folder of a run" if folder.is_dir() else "there is no such folder"
        raise ConfigError(f"{folder}: {there}; name one such as runs/digits/sgd/seed0")
    for override in overrides:
        if not override.startswith("data."):
            raise ConfigError(f"{override}: only settings of the data can change here, such as data.root=...")
    try:
        recipe = load_recipe(config, overrides)
    except ConfigError as error:
        raise ConfigError(f"{folder}: has a config.yaml that cannot be read ({error})") from error
    results = folder / "results.json"
    if not results.exists():
        raise ConfigError(f"{folder}: is not finished; python -m composer_sassha train {config} continues it")
    found = read_results(results)
    if found is None:
        raise ConfigError(f"{results}: is damaged; delete it, and train the run again to write it")
    checkpoints = folder / "checkpoints"
    newest = checkpoints / LATEST
    whole = [newest] if newest.exists() else [*checkpoints.glob("ep*-ba*-rank0.pt")]
    whole = [path.resolve() for path in whole if is_zipfile(path)]
    if not whole:
        raise ConfigError(f"{checkpoints}: has no checkpoint that can be read; restore it")
    return Finished(folder, recipe, found, max(whole, key=lambda path: path.stat().st_mtime_ns))


def comparison_folder(runs: Sequence[Finished]) -> Path:
    """Return the folder of the comparison that all these runs belong to.

    Raises:
        ConfigError: they belong to several.
    """
    homes = {run.folder.resolve().parents[1]: run for run in runs}
    if len(homes) > 1:
        first, second = [str(run.folder) for run in homes.values()][:2]
        raise ConfigError(f"{first} and {second}: are of two comparisons; inspect one at a time")
    return next(iter(homes))
