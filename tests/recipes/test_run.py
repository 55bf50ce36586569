"""Runs that are stopped and continued."""

import json
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from composer import Callback, Logger, State
from composer.core import Timestamp
from composer.utils import dist

from composer_sassha.recipes.config import Recipe, load_recipe
from composer_sassha.recipes.errors import ConfigError
from composer_sassha.recipes.folder import check_seen
from composer_sassha.recipes.run import train_recipe
from composer_sassha.recipes.run_log import RunLog


class Stop(Callback):
    """Stops the process, as it were, at one event when so many steps have been taken."""

    def __init__(self, event: str, batch: int) -> None:
        self.batch = batch
        setattr(self, event, self._stop)

    def _stop(self, state: State, logger: Logger) -> None:
        if state.timestamp.batch == self.batch:
            raise KeyboardInterrupt


def recipe(folder: Path, method: str, *more: str) -> Recipe:
    settings = [f"method={method}", f"save_folder={folder}", "max_duration=2ep", "save_interval=4ba"]
    return load_recipe("digits", [*settings, "data.shift=1", "progress_bar=false", *more])


def weights(recipe: Recipe) -> dict[str, torch.Tensor]:
    checkpoint = torch.load(recipe.folder / "checkpoints" / "latest-rank0.pt", weights_only=False)
    return checkpoint["state"]["model"]


def metrics(recipe: Recipe) -> list[dict[str, Any]]:
    lines = (recipe.folder / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if not k.endswith("seconds")} for line in lines]


def same_runs(first: Recipe, second: Recipe) -> None:
    for (name, left), right in zip(weights(first).items(), weights(second).values(), strict=True):
        assert torch.equal(left, right), name
    assert metrics(first) == metrics(second)
    results = [json.loads((r.folder / "results.json").read_text()) for r in (first, second)]
    measured = [{k: v for k, v in r.items() if "seconds" not in k and k != "method"} for r in results]
    assert measured[0] == measured[1] and measured[0]["loss"] is not None


SCHEDULES = "schedules={rho: {name: cosine, alpha_f: 0.1}, hessian_power: {name: follow_lr, alpha_f: 2.0}}"


@pytest.mark.parametrize(
    "settings",
    [["sgd"], ["adamw"], ["sam"], ["looksam"], ["esam"], ["sophia_g"], ["sassha"], ["msassha", SCHEDULES]],
    ids=" ".join,
)
def test_a_continued_run_equals_an_uninterrupted_one(settings: list[str], tmp_path: Path) -> None:
    whole, parts = recipe(tmp_path / "whole", *settings), recipe(tmp_path / "parts", *settings)
    train_recipe(whole)
    for event, batch in [("batch_end", 3), ("batch_start", 7), ("after_train_batch", 15)]:
        with pytest.raises(KeyboardInterrupt):
            train_recipe(parts, [Stop(event, batch)])
    train_recipe(parts)
    same_runs(whole, parts)
    assert len(list((parts.folder / "checkpoints").glob("ep*.pt"))) == 1


MONITOR = "{interval: %s, measures: {eigenvalues: 0, trace_samples: 2, m: [], directions: 0}, %s}"


@pytest.mark.parametrize(
    ("interval", "saved"), [("3ba", "4ba"), ("11ba", "11ba"), ("1ep", "11ba"), ("1ep", "1ep")]
)
def test_a_measurement_is_neither_lost_nor_repeated(interval: str, saved: str, tmp_path: Path) -> None:
    spectrum = "spectrum_epochs: [1], spectrum_steps: 2, spectrum_probes: 1"
    settings = ["sgd", f"callbacks.sharpness_monitor={MONITOR % (interval, spectrum)}", "model.width=2"]
    settings += [f"save_interval={saved}", "eval_interval=2ep"]  # no evaluation takes the first along
    whole, parts = recipe(tmp_path / "whole", *settings), recipe(tmp_path / "parts", *settings)
    train_recipe(whole)
    for event, batch in [("epoch_end", 11), ("epoch_checkpoint", 11), ("batch_start", 12), ("fit_end", 22)]:
        with pytest.raises(KeyboardInterrupt):
            train_recipe(parts, [Stop(event, batch)])
    train_recipe(parts)
    same_runs(whole, parts)
    measured = [record["batch"] for record in metrics(whole) if "sharpness/trace" in record]
    assert measured == {"3ba": [*range(3, 22, 3), 22], "11ba": [11, 22], "1ep": [11, 22]}[interval]
    assert ["sharpness/spectrum" in record for record in metrics(whole)].count(True) == 1


def test_what_callbacks_measure_is_not_training_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = 0.0
    monkeypatch.setattr("time.perf_counter", lambda: clock)
    log = RunLog(tmp_path / "metrics.jsonl", "test", [])
    now = Timestamp()

    def step(measured: float) -> None:
        """One second of training, and then a measurement."""
        nonlocal clock, now
        before = clock
        log.batch_start(SimpleNamespace(timestamp=now), None)
        clock += 1.0 + measured
        if measured:
            log.log_metrics({"sharpness/seconds": measured})
        now = now.to_next_batch(duration=timedelta(seconds=clock - before - measured + late))
        log.batch_end(SimpleNamespace(timestamp=now), None)

    late = 0.0  # what Composer's clock counts into this step
    step(5.0)
    late = 5.0
    step(0.0)
    late = 0.0
    log.log_metrics({"sharpness/seconds": 7.0, "sharpness/spectrum_seconds": 20.0})
    log.epoch_end(SimpleNamespace(timestamp=now), None)
    saved = log.state_dict()
    assert log.seconds(now) == 2.0
    late = 27.0
    step(0.0)
    assert log.seconds(now) == 3.0
    assert [record["seconds"] for record in log.records if "seconds" in record] == [1.0, 1.0, 1.0]

    again = RunLog(tmp_path / "metrics.jsonl", "test", [])
    again.load_state_dict(saved)
    again.batch_start(SimpleNamespace(timestamp=now), None)
    assert again.seconds(Timestamp(total_wct=timedelta(seconds=7))) == 2.0


@pytest.mark.parametrize(
    ("event", "interval"), [("epoch_end", "11ba"), ("eval_end", "11ba"), ("fit_end", "1ep")]
)
def test_stopped_around_an_evaluation(event: str, interval: str, tmp_path: Path) -> None:
    whole = recipe(tmp_path / "whole", "sgd", f"save_interval={interval}")
    parts = recipe(tmp_path / "parts", "sgd", f"save_interval={interval}")
    train_recipe(whole)
    with pytest.raises(KeyboardInterrupt):
        train_recipe(parts, [Stop(event, 22 if event == "fit_end" else 11)])
    train_recipe(parts)
    same_runs(whole, parts)


def test_stopped_before_the_last_evaluation(tmp_path: Path) -> None:
    """Training that ends within an epoch is evaluated after its last checkpoint."""
    whole = recipe(tmp_path / "whole", "sgd", "max_duration=15ba")
    parts = recipe(tmp_path / "parts", "sgd", "max_duration=15ba")
    train_recipe(whole)
    with pytest.raises(KeyboardInterrupt):
        train_recipe(parts, [Stop("fit_end", 15)])
    train_recipe(parts)
    same_runs(whole, parts)


def test_a_checkpoint_that_a_kill_left_half_written_is_replaced(tmp_path: Path) -> None:
    whole, parts = recipe(tmp_path / "whole", "sgd"), recipe(tmp_path / "parts", "sgd")
    train_recipe(whole)
    with pytest.raises(KeyboardInterrupt):
        train_recipe(parts, [Stop("batch_end", 7)])
    (parts.folder / "checkpoints" / "ep0-ba8-rank0.pt").write_bytes(b"half")
    with (parts.folder / "metrics.jsonl").open("a") as file:
        file.write('{"batch": 8, "ep')
    train_recipe(parts)
    same_runs(whole, parts)
    assert len(list((parts.folder / "checkpoints").glob("ep*.pt"))) == 1


def test_a_first_checkpoint_that_a_kill_left_half_written_is_not_continued_from(tmp_path: Path) -> None:
    whole, parts = recipe(tmp_path / "whole", "sgd"), recipe(tmp_path / "parts", "sgd")
    train_recipe(whole)
    with pytest.raises(KeyboardInterrupt):
        train_recipe(parts, [Stop("batch_end", 3)])
    first = parts.folder / "checkpoints" / "ep0-ba4-rank0.pt"
    train_recipe(recipe(tmp_path / "source", "sgd", "max_duration=4ba"))
    first.write_bytes(next(tmp_path.glob("source/**/ep0-ba4-rank0.pt")).read_bytes()[:-100])
    train_recipe(parts)
    same_runs(whole, parts)
    assert len(list((parts.folder / "checkpoints").glob("ep*.pt"))) == 1


def test_a_checkpoint_that_another_node_does_not_see_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dist, "all_gather_object", lambda seen: [seen, False])
    with pytest.raises(ConfigError, match="rank 1 does not see it"):
        check_seen(__file__)


def test_a_diverged_run_is_recorded_as_valid_json(tmp_path: Path) -> None:
    results = train_recipe(
        recipe(tmp_path, "sgd", "optimizer.lr=1e30", "schedulers=null", "max_duration=1ep")
    )
    assert results["loss"] is None
    assert "NaN" not in "".join(path.read_text() for path in tmp_path.rglob("*.json*"))
