"""The command `train` in processes of its own: several ranks, and signals."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.commands import SMALL, records, train
from tests.distributed.launch import finish, start

QUICK = ["digits", "method=sgd", "max_duration=2ep", *SMALL]
MEASURES = "{eigenvalues: 0, trace_samples: 2, m: [], directions: 0}"
EPOCHS = f"callbacks.sharpness_monitor={{interval: 1ep, batches: 1, measures: {MEASURES}}}"
pytestmark = pytest.mark.xdist_group("launch")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, empty."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def train_in(folder: Path, argv: list[str]) -> None:
    """Run the command in a process of its own, whose output goes to a file."""
    os.chdir(folder)
    sys.stdout = (folder / f"out{os.environ.get('RANK', 0)}").open("w")
    status = train(argv)
    sys.stdout.close()
    sys.exit(status)


def did_the_same_job(run: Path) -> None:
    """Assert that two ranks have measured and evaluated the same weights."""
    results = json.loads((run / "results.json").read_text())
    assert results["world_size"] == 2 and results["steps"] == 10
    losses = [r["sharpness/loss"] for r in records(run) if "sharpness/trace" in r]
    evaluated = [r["metrics/test/CrossEntropy"] for r in records(run) if "metrics/test/CrossEntropy" in r]
    assert len(losses) == 2 and losses == pytest.approx(evaluated, rel=1e-5)


def test_two_ranks_do_the_same_job(folder: Path) -> None:
    argv = [*QUICK, "method=sassha", EPOCHS]
    ranks = start(2, folder / "log", train_in, folder, argv, meet=False)
    assert finish(ranks), (folder / "log").read_text()
    did_the_same_job(folder / "runs/digits/sassha/seed0")
    first, second = ((folder / f"out{rank}").read_text() for rank in range(2))
    assert first.count("epoch   2/2") == 1 and second == ""


@pytest.mark.slow
def test_composers_launcher_starts_the_command(folder: Path) -> None:
    command = [Path(sys.executable).with_name("composer"), "-n", "2", "-m", "composer_sassha", "train"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(
        [*command, *QUICK, "method=sassha", EPOCHS], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("epoch   2/2") == 1
    did_the_same_job(folder / "runs/digits/sassha/seed0")


@pytest.mark.parametrize(("sent", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_stops_the_run_and_says_how_to_go_on(
    folder: Path, sent: signal.Signals, status: int
) -> None:
    log = folder / "log"
    (process,) = start(1, log, train_in, folder, [*QUICK, "max_duration=5000ep"])
    metrics = folder / "runs/digits/sgd/seed0/metrics.jsonl"
    while process.is_alive() and not (metrics.exists() and metrics.read_text().count("\n") > 3):
        time.sleep(0.1)
    os.kill(process.pid, sent)
    process.join(60)
    assert process.exitcode == status
    err = log.read_text()
    assert err == "interrupted; the same command continues the run from its last checkpoint, if it has one\n"
