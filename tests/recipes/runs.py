"""Short runs: how they are made, stopped and compared."""

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from composer import Callback, Logger, State

from composer_sassha.recipes.config import Recipe, load_recipe
from composer_sassha.recipes.run import train_recipe


class Stop(Callback):
    """Stops the process, as it were, at one event after a number of steps."""

    def __init__(self, event: str, batch: int) -> None:
        self.batch = batch
        setattr(self, event, self._stop)

    def _stop(self, state: State, logger: Logger) -> None:
        if state.timestamp.batch == self.batch:
            raise KeyboardInterrupt


@pytest.fixture
def without_curves(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave an empty curves.png: drawing takes longer than these runs."""
    monkeypatch.setattr("composer_sassha.recipes.folder.draw_curves", lambda log, path, **_: path.touch())


def recipe(folder: Path, method: str, *more: str) -> Recipe:
    """Return a run of two epochs of 5 steps, with a small net."""
    settings = [f"method={method}", f"save_folder={folder}", "max_duration=2ep", "save_interval=4ba"]
    small = ["model.width=2", "data.batch_size=256", "progress_bar=false"]
    return load_recipe("digits", [*settings, *small, *more])


def stopped(recipe: Recipe, *stops: tuple[str, int]) -> None:
    """Train a recipe up to each stop in turn."""
    for stop in stops:
        with pytest.raises(KeyboardInterrupt):
            train_recipe(recipe, [Stop(*stop)])


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Recipe]:
    """Train each recipe once, and return it."""

    @cache
    def trained(method: str, *more: str) -> Recipe:
        found = recipe(tmp_path_factory.mktemp("whole"), method, *more)
        train_recipe(found)
        return found

    return trained


def weights(recipe: Recipe) -> dict[str, torch.Tensor]:
    """Load the last weights of a run."""
    checkpoint = torch.load(recipe.folder / "checkpoints" / "latest-rank0.pt", weights_only=False)
    return checkpoint["state"]["model"]


def metrics(recipe: Recipe) -> list[dict[str, Any]]:
    """Read the records of a run, without times."""
    lines = (recipe.folder / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if not k.endswith("seconds")} for line in lines]


def same_runs(first: Recipe, second: Recipe) -> None:
    """Assert that two runs have the same weights, records and results."""
    for (name, left), right in zip(weights(first).items(), weights(second).values(), strict=True):
        assert torch.equal(left, right), name
    assert metrics(first) == metrics(second)
    results = [json.loads((r.folder / "results.json").read_text()) for r in (first, second)]
    measured = [{k: v for k, v in r.items() if "seconds" not in k and k != "method"} for r in results]
    assert measured[0] == measured[1] and measured[0]["loss"] is not None
