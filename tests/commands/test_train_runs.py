"""The command `train`: what a run leaves on the disk, and what a later call makes of it."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from statistics import fmean

import pytest
from filelock import FileLock

from tests.commands import SMALL, records, refused, train
from tests.recipes.runs import without_curves

__all__ = ["without_curves"]

QUICK = ["digits", "method=sgd", "max_duration=2ep", *SMALL]
MEASURES = "{eigenvalues: 0, trace_samples: 2, m: [], directions: 0}"
MONITOR = f"callbacks.sharpness_monitor={{interval: 4ba, batches: 1, measures: {MEASURES}}}"
EPOCHS = MONITOR.replace("4ba", "1ep")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, empty."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one finished run."""
    folder = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("composer_sassha.recipes.folder.draw_curves", lambda log, path, **_: path.touch())
        patch.chdir(folder)
        assert train(QUICK) == 0
    return folder


@pytest.fixture
def finished(trained: Path, folder: Path, without_curves: None) -> Path:
    """A copy of the finished run, in the working directory."""
    shutil.copytree(trained, folder, symlinks=True, dirs_exist_ok=True)
    return folder / "runs/digits/sgd/seed0"


@pytest.fixture
def unfinished(finished: Path) -> Path:
    """A run that lacks its results, as if it had been stopped before its end."""
    (finished / "results.json").unlink()
    return finished


def content(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_run_leaves_everything_and_is_left_alone(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = [*QUICK, "method=sassha", "seed=3"]
    assert train(argv) == 0
    out, err = capsys.readouterr()
    assert err == ""
    lines = out.splitlines()
    assert lines[1].startswith("epoch   2/2  train loss ") and "  test accuracy " in lines[1]

    run = folder / "runs/digits/sassha/seed3"
    names = {"config.yaml", "metrics.jsonl", "results.json", "curves.png", "checkpoints", ".lock"}
    assert {path.name for path in run.iterdir()} == names
    assert (run / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert len(list((run / "checkpoints").glob("ep*.pt"))) == 1

    results = json.loads((run / "results.json").read_text())
    expected = {"recipe": "digits", "method": "sassha", "seed": 3, "steps": 10, "epochs": 2, "world_size": 1}
    assert results.items() >= (expected | {"reported": None, "heldout": "test"}).items()
    assert 0 <= results["accuracy"] <= 1 and results["loss"] > 0
    assert results["seconds"] > 0 and results["seconds_per_step"] > 0 and results["parameters"] > 0
    assert f"test accuracy {results['accuracy']:.2%}" in lines[2]

    steps = [record for record in records(run) if "loss/train/total" in record]
    assert [record["batch"] for record in steps] == list(range(1, 11))
    assert [record["epoch"] for record in steps] == [0] * 5 + [1] * 5
    assert all(record["seconds"] > 0 and record["processor_seconds"] > 0 for record in steps)
    assert results["processor_seconds_per_step"] == pytest.approx(
        fmean(record["processor_seconds"] for record in steps[5:])
    )
    evaluations = [record for record in records(run) if "metrics/test/MulticlassAccuracy" in record]
    assert [(record["batch"], record["epoch"]) for record in evaluations] == [(5, 1), (10, 2)]
    assert evaluations[-1]["metrics/test/MulticlassAccuracy"] == results["accuracy"]

    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    assert train(argv) == 0
    assert capsys.readouterr().out.splitlines() == lines[2:]
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before


@pytest.mark.usefixtures("without_curves")
def test_a_run_is_watched_by_a_callback_and_does_not_change(folder: Path) -> None:
    argv = [*QUICK, "method=sassha", "eval_interval=2ep"]
    spectrum = [f"callbacks.sharpness_monitor.spectrum_{name}" for name in ("epochs=[1]", "steps=3")]
    assert train([*argv, MONITOR, *spectrum]) == 0
    assert train([*argv, "save_folder=plain"]) == 0
    runs = [folder / root / "digits/sassha/seed0" for root in ("runs", "plain")]
    with_it, without = (json.loads((run / "results.json").read_text()) for run in runs)
    for results in (with_it, without):
        assert all(results.pop(f"{key}_per_step") > 0 for key in ("seconds", "processor_seconds"))
        assert results.pop("seconds") > 0
    assert with_it == without

    with_it, without = map(records, runs)
    measured = [record for record in with_it if "sharpness/trace" in record]
    # In the records of the steps, and at the end of the training, which is that of an epoch, in its own.
    clocks = [(record["batch"], record["epoch"], "seconds" in record) for record in measured]
    assert clocks == [(4, 0, True), (8, 1, True), (10, 2, False)]
    (spectrum,) = (record for record in with_it if "sharpness/spectrum" in record)
    assert (spectrum["batch"], spectrum["epoch"], len(spectrum["sharpness/spectrum"])) == (5, 1, 12)
    names = {*measured[-1], *spectrum} - {"batch", "epoch"}
    names |= (times := {"seconds", "processor_seconds"})
    left = [{key: value for key, value in r.items() if key not in names} for r in with_it]
    assert [r for r in left if r.keys() != {"batch", "epoch"}] == [
        {key: value for key, value in r.items() if key not in times} for r in without
    ]
    assert with_it[-1]["metrics/test/CrossEntropy"] == pytest.approx(measured[-1]["sharpness/loss"], rel=1e-5)


def test_callbacks_that_come_too_late_are_refused(
    finished: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = (finished / "config.yaml").read_text()
    (finished / "config.yaml").write_text(text.replace("callbacks: {}\n", ""))  # as before there were any
    assert text != (finished / "config.yaml").read_text()
    before = content(folder)
    assert train(QUICK) == 0
    capsys.readouterr()
    for done in (True, False):
        message = refused([*QUICK, MONITOR], capsys)
        assert "without the callbacks given here" in message and "save_folder" in message
        assert content(folder) == before
        if done:
            before.pop(finished / "results.json")
            (finished / "results.json").unlink()
    (finished / "checkpoints/latest-rank0.pt").unlink()
    for path in (finished / "checkpoints").iterdir():
        path.unlink()
    assert train([*QUICK, MONITOR]) == 0  # it had nothing to lose
    assert "sharpness/trace" in (finished / "metrics.jsonl").read_text()
    assert train([*QUICK, MONITOR]) == 0 and train(QUICK) == 0  # the same run, with them or not
    assert "with another" not in capsys.readouterr().err
    assert "without the callbacks" in refused([*QUICK, EPOCHS], capsys)


@pytest.mark.usefixtures("without_curves")
def test_the_step_time_is_relative_to_the_baselines(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    quick = ["max_duration=1ba", "method=sam", *SMALL]
    assert train(quick) == 0
    assert "times sgd's" not in capsys.readouterr().out
    for seed in range(2):
        assert train([*quick, "method=sgd", f"seed={seed}"]) == 0
    capsys.readouterr()
    assert train(quick) == 0
    paths = [Path("runs/digits", run, "results.json") for run in ("sam/seed0", "sgd/seed0", "sgd/seed1")]
    sam, *sgd = (json.loads(path.read_text())["processor_seconds_per_step"] for path in paths)
    assert f"({sam / fmean(sgd):.2f} times sgd's)" in capsys.readouterr().out
    for path in paths[1:]:  # a damaged baseline does not hurt another run
        path.write_text("{")
    assert train(quick) == 0
    assert "times sgd's" not in capsys.readouterr().out


@pytest.mark.usefixtures("without_curves")
def test_the_resolved_config_repeats_the_run(folder: Path) -> None:
    assert train([*QUICK, "max_duration=3ba", "data.shift=1"]) == 0
    assert train(["runs/digits/sgd/seed0/config.yaml", "save_folder=again"]) == 0
    first, again = (
        json.loads(Path(root, "digits/sgd/seed0/results.json").read_text()) for root in ("runs", "again")
    )
    assert first["loss"] == again["loss"]


def test_a_folder_with_another_run_is_refused(
    finished: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = content(folder)
    message = refused([*QUICK, "optimizer.lr=0.5"], capsys)
    assert "optimizer.lr (" in message and "there, 0.5 here)" in message and "save_folder" in message
    assert content(folder) == before
    assert train([*QUICK, "progress_bar=true", "baseline=adamw"]) == 0  # neither changes the result


def test_a_folder_that_is_not_a_run_is_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    thesis = folder / "runs/digits/sgd/seed0/thesis.txt"
    thesis.parent.mkdir(parents=True)
    thesis.write_text("precious")
    assert "not a run" in refused(QUICK, capsys)
    assert list(thesis.parent.iterdir()) == [thesis]


def test_a_run_that_another_process_trains_is_refused(
    unfinished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (unfinished / "metrics.jsonl").read_bytes()
    with FileLock(unfinished / ".lock"):
        assert "another process trains this run" in refused(QUICK, capsys)
    assert (unfinished / "metrics.jsonl").read_bytes() == before
    assert train(QUICK) == 0


def newest(run: Path) -> Path:
    return (run / "checkpoints/latest-rank0.pt").resolve()


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda run: cut(newest(run)), ["ep2-ba10-rank0.pt", "cannot be loaded", "start again"]),
        (lambda run: cut(run / "metrics.jsonl"), ["metrics.jsonl", "restore it"]),
        (lambda run: (run / "metrics.jsonl").write_text("x\n" * 100), ["metrics.jsonl", "line 1 is damaged"]),
        (lambda run: (run / "results.json").write_text("{"), ["results.json", "is damaged; delete it"]),
        (lambda run: (run / "results.json").write_text("[]"), ["results.json", "is damaged; delete it"]),
        (lambda run: (run / "config.yaml").write_text("model: 3"), ["cannot be read", "save_folder"]),
    ],
)
def test_a_damaged_run_is_named_and_kept(
    damage: Callable[[Path], object], said: list[str], unfinished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    damage(unfinished)
    before = content(unfinished)
    message = refused(QUICK, capsys)
    assert all(part in message for part in said), message
    assert content(unfinished) == before


@pytest.mark.parametrize("dangling", [True, False])
def test_a_lost_link_to_the_newest_checkpoint_is_made_anew(dangling: bool, unfinished: Path) -> None:
    before = (unfinished / "metrics.jsonl").read_text()
    link = unfinished / "checkpoints/latest-rank0.pt"
    link.unlink()
    if dangling:
        link.symlink_to("ep1-ba5-rank0.pt")
    assert train(QUICK) == 0
    assert (unfinished / "metrics.jsonl").read_text() == before  # nothing was trained again
    assert json.loads((unfinished / "results.json").read_text())["steps"] == 10


@pytest.mark.usefixtures("without_curves")
def test_a_run_that_diverges_says_so(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train([*QUICK, "optimizer.lr=1e30", "max_duration=1ep"]) == 0
    assert "diverged" in capsys.readouterr().out
