"""Runs that are stopped and continued."""

from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import pytest
from composer.core import Timestamp
from composer.utils import dist

from composer_sassha.recipes.config import Recipe
from composer_sassha.recipes.errors import ConfigError
from composer_sassha.recipes.folder import check_seen
from composer_sassha.recipes.run import train_recipe
from composer_sassha.recipes.run_log import RunLog
from tests.recipes.runs import metrics, recipe, same_runs, stopped

Whole = Callable[..., Recipe]

SCHEDULES = "schedules={rho: {name: cosine, alpha_f: 0.1}, hessian_power: {name: follow_lr, alpha_f: 2.0}}"


@pytest.mark.parametrize(
    "settings",
    [
        ["sgd"],
        ["adamw"],
        ["sam"],
        ["looksam", "algorithms.looksam.interval=3"],
        ["esam"],
        ["sophia_g", "algorithms.lazy_hessian.interval=3"],
        ["sassha", "algorithms.sassha.hessian_interval=3"],
        ["msassha", SCHEDULES],
    ],
    ids=" ".join,
)
def test_a_continued_run_equals_an_uninterrupted_one(
    settings: list[str], whole: Whole, tmp_path: Path
) -> None:
    parts = recipe(tmp_path, *settings)
    stops = [("batch_end", 3), ("batch_start", 5), ("after_train_batch", 7)]
    # Before the first checkpoint nothing of the method is kept, so that one method will do.
    stopped(parts, *(stops if settings == ["sgd"] else stops[-1:]))
    train_recipe(parts)
    same_runs(whole(*settings), parts)
    assert len(list((parts.folder / "checkpoints").glob("ep*.pt"))) == 1


MONITOR = "{interval: %s, batches: 1, measures: {eigenvalues: 0, trace_samples: 2, m: [], directions: 0}, %s}"


@pytest.mark.parametrize(
    ("interval", "saved", "stops"),
    [
        ("3ba", "2ba", [("epoch_end", 5), ("batch_start", 6)]),
        ("5ba", "5ba", [("epoch_end", 5), ("epoch_checkpoint", 5), ("fit_end", 10)]),
        ("1ep", "5ba", [("epoch_end", 5), ("epoch_checkpoint", 5), ("batch_start", 6)]),
        ("1ep", "1ep", [("epoch_checkpoint", 5), ("fit_end", 10)]),
    ],
)
def test_a_measurement_is_neither_lost_nor_repeated(
    interval: str, saved: str, stops: list[tuple[str, int]], whole: Whole, tmp_path: Path
) -> None:
    spectrum = "spectrum_epochs: [1], spectrum_steps: 2, spectrum_probes: 1"
    settings = ["sgd", f"callbacks.sharpness_monitor={MONITOR % (interval, spectrum)}", "eval_interval=2ep"]
    once = whole(*settings)
    parts = recipe(tmp_path, *settings, f"save_interval={saved}")  # no evaluation takes the first along
    stopped(parts, *stops)
    train_recipe(parts)
    same_runs(once, parts)
    measured = [record["batch"] for record in metrics(once) if "sharpness/trace" in record]
    assert measured == {"3ba": [3, 6, 9, 10], "5ba": [5, 10], "1ep": [5, 10]}[interval]
    assert ["sharpness/spectrum" in record for record in metrics(once)].count(True) == 1


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
    ("event", "interval"), [("epoch_end", "5ba"), ("eval_end", "5ba"), ("fit_end", "1ep")]
)
def test_stopped_around_an_evaluation(event: str, interval: str, whole: Whole, tmp_path: Path) -> None:
    parts = recipe(tmp_path, "sgd", f"save_interval={interval}")
    stopped(parts, (event, 10 if event == "fit_end" else 5))
    train_recipe(parts)
    same_runs(whole("sgd"), parts)


def test_stopped_before_the_last_evaluation(whole: Whole, tmp_path: Path) -> None:
    """Training that ends within an epoch is evaluated after its last checkpoint."""
    parts = recipe(tmp_path, "sgd", "max_duration=7ba")
    stopped(parts, ("fit_end", 7))
    train_recipe(parts)
    same_runs(whole("sgd", "max_duration=7ba"), parts)


def test_a_checkpoint_left_half_written_is_replaced(whole: Whole, tmp_path: Path) -> None:
    parts = recipe(tmp_path, "sgd")
    stopped(parts, ("batch_end", 7))
    (parts.folder / "checkpoints" / "ep1-ba8-rank0.pt").write_bytes(b"half")
    (parts.folder / "checkpoints" / "ep0-ba2-rank0.pt").write_bytes(b"old, and not deleted yet")
    with (parts.folder / "metrics.jsonl").open("a") as file:
        file.write('{"batch": 8, "ep')
    train_recipe(parts)
    same_runs(whole("sgd"), parts)
    assert len(list((parts.folder / "checkpoints").glob("ep*.pt"))) == 1


def test_a_first_checkpoint_left_half_written_is_not_loaded(whole: Whole, tmp_path: Path) -> None:
    parts = recipe(tmp_path, "sgd")
    stopped(parts, ("batch_end", 5))
    checkpoints = parts.folder / "checkpoints"
    first = checkpoints / "ep0-ba4-rank0.pt"
    first.write_bytes(first.read_bytes()[:-100])
    (checkpoints / "latest-rank0.pt").unlink()  # Composer makes the link when the file is complete
    train_recipe(parts)
    same_runs(whole("sgd"), parts)
    assert len(list(checkpoints.glob("ep*.pt"))) == 1


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
