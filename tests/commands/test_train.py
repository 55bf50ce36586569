"""The command: exit statuses, messages, and what it leaves on the disk."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import fmean, median

import pytest
from filelock import FileLock

from tests.commands import train
from tests.distributed.launch import start

QUICK = ["digits", "method=sgd", "max_duration=2ep", "progress_bar=false"]
MISTAKES = [
    # arguments, and what the line on standard error must contain
    (["optimizer.lrr=1"], ["optimizer.lrr", "did you mean optimizer.lr?", "sassha takes: lr, betas"]),
    (["sed=1"], ["sed:", "did you mean seed?"]),
    (["data.batchsize=1"], ["data.batchsize", "did you mean data.batch_size?"]),
    (["algorithms.sassha.ro=1"], ["algorithms.sassha.ro", "did you mean algorithms.sassha.rho?"]),
    (["method=sgd", "schedulers.warmup=2ep"], ["schedulers.warmup", "did you mean schedulers.t_warmup?"]),
    (["seed=abc"], ["seed", "abc", "Integer"]),
    (["optimizer.lr=high"], ["optimizer.lr", "high", "Float"]),
    (["optimizer=sgd"], ["optimizer=sgd", "did you mean optimizer.name=sgd?"]),
    (["algorithms=3"], ["algorithms", "3"]),
    (["algorithms.sassha=null"], ["SASSHA needs a Hessian"]),
    (["model=null"], ["model", "None"]),
    (["method=sasha"], ["method", "sasha", "did you mean sassha?"]),
    (["model.name=resnet_cifr"], ["model.name", "resnet_cifr", "did you mean resnet_cifar?"]),
    (["data.name=digts"], ["data.name", "digts", "did you mean digits?"]),
    (["optimizer.name=sdg"], ["optimizer.name", "sdg", "did you mean sgd?"]),
    (["algorithms.sasha={}"], ["algorithms.sasha", "did you mean sassha?"]),
    (["schedulers.name=cosin"], ["schedulers.name", "cosin", "did you mean cosine?"]),
    (["schedulers.name=multi_step"], ["schedulers.milestones", "multi_step"]),
    (["baseline=sdg"], ["baseline", "sdg", "did you mean sgd?"]),
    (["data.evaluate_on=tset"], ["data.evaluate_on=tset", "did you mean test?"]),
    (["digit"], ["digit", "did you mean digits?"]),
    (["yamls/digit.yaml"], ["yamls/digit.yaml", "did you mean digits?"]),
    (["other/digits.yaml"], ["other/digits.yaml", "no such recipe"]),
    (["digits", "seed"], ["seed", "key=value"]),
    (["=1"], ["=1", "key=value"]),
    (["--sed=1"], ["--sed=1"]),
    (["optimizer.lr=[1"], ["optimizer.lr=[1", "not valid YAML"]),
    (["seed=${nowhere}"], ["seed", "nowhere"]),
    (["seed=-1"], ["seed=-1", "[0, "]),
    (["optimizer.lr=-1"], ["optimizer", "lr=-1.0", ">= 0"]),
    (["optimizer.lr=nan"], ["optimizer", "lr=nan", ">= 0"]),
    (["optimizer.betas=[0.9,1]"], ["optimizer", "betas[1]=1.0", "[0, 1)"]),
    (["algorithms.sassha.rho=-0.1"], ["algorithms.sassha", "rho=-0.1", ">= 0"]),
    (["algorithms.sassha.interval=0"], ["algorithms.sassha", "interval=0", ">= 1"]),
    (["method=sam", "algorithms.sam.p=3"], ["algorithms.sam", "p=3.0", "2 or inf"]),
    (["method=gsam", "algorithms.gsam.rho_min=1"], ["algorithms.gsam", "rho_min=1.0", "<= rho_max=0.05"]),
    (["method=esam", "algorithms.esam.gamma=0"], ["algorithms.esam", "gamma=0.0", "(0, 1]"]),
    (["method=sgd", "algorithms.msam.rho=1", "optimizer.momentum=0"], ["MSAM", "SGD", "no momentum"]),
    (["method=adahessian", "optimizer.block_size=7"], ["optimizer", "block_size=7", "640"]),
    (["optimizer.hessian_power=1.5"], ["optimizer", "hessian_power=1.5", "[0, 1]"]),
    (["schedules.lr.name=cosine"], ["schedules.lr", "name='lr'"]),
    (["schedules.rh={name: cosine}"], ["Schedule", "'rh'", "(rho, "]),
    (["schedules.rho.name=cosin"], ["schedules.rho.name", "cosin", "did you mean cosine"]),
    (["schedules.rho=0.1"], ["schedules.rho", "0.1"]),
    (["schedules.rho={alpha_f: 0.1}"], ["schedules.rho.name: not given", "cosine"]),
    (["schedules=[rho]"], ["schedules=['rho']"]),
    (["algorithms=[sam]"], ["algorithms=['sam']"]),
    (["callbacks.sharpnes_monitor={}"], ["callbacks.sharpnes_monitor", "did you mean sharpness_monitor?"]),
    (
        ["callbacks.sharpness_monitor.intervall=1ep"],
        ["callbacks.sharpness_monitor.intervall", "did you mean callbacks.sharpness_monitor.interval?"],
    ),
    (
        ["callbacks.sharpness_monitor.measures.eigenvalue=1"],
        ["measures.eigenvalue:", "did you mean callbacks.sharpness_monitor.measures.eigenvalues?"],
    ),
    (["callbacks.sharpness_monitor=1ep"], ["callbacks.sharpness_monitor", "'1ep'", "mapping"]),
    (["callbacks.sharpness_monitor.measures=null"], ["callbacks.sharpness_monitor.measures", "None"]),
    (["callbacks.sharpness_monitor.measures.m=[0]"], ["callbacks.sharpness_monitor.measures", "m=0", ">= 1"]),
    (["callbacks.sharpness_monitor.measures.tol=high"], ["sharpness_monitor.measures.tol=high", "Float"]),
    (
        ["callbacks.sharpness_monitor.interval=soon"],
        ["callbacks.sharpness_monitor", "interval='soon'", "1ep"],
    ),
    (["callbacks.sharpness_monitor.interval=0ba"], ["callbacks.sharpness_monitor", "interval='0ba'"]),
    (["callbacks.sharpness_monitor.batches=0"], ["callbacks.sharpness_monitor", "batches=0", ">= 1"]),
    (["algorithms.msassha={}"], ["perturbed twice (Sassha(", "and MSassha(", "keep one"]),
    (["method=sgd", "optimizer.nesterov=true", "optimizer.momentum=0"], ["optimizer", "momentum"]),
    (["model.depth=9"], ["model", "depth=9", "6n + 2", "8"]),
    (["model.in_channels=3"], ["model", "3 channels"]),
    (["model.num_classes=5"], ["model", "out of bounds"]),
    (["data.batch_size=5000"], ["data", "batch_size=5000", "1437"]),
    (["max_duration=30"], ["max_duration=30", "30ep"]),
    (["max_duration=0ep"], ["max_duration=0ep", "above 0ep"]),
    (["save_interval=0ba"], ["save_interval=0ba", "above 0ba"]),
    (["save_folder=a{rank}b"], ["save_folder=a{rank}b", "braces"]),
    ([""], ["(empty)", "digits"]),
    ([".", "seed=1"], [".", "digits"]),
    (["schedulers.t_warmup=2 epochs"], ["schedulers.t_warmup=2 epochs", "30ep"]),
    (["schedulers={name: multi_step, milestones: [1ep, x]}"], ["schedulers.milestones", "x"]),
    (["precision=amp_fp16"], ["precision=amp_fp16", "needs a GPU"]),
    (["precision=fp23"], ["precision=fp23", "did you mean fp32?"]),
    (["device_train_microbatch_size=0"], ["device_train_microbatch_size=0"]),
    (["cpu_threads=0"], ["cpu_threads=0", "at least 1"]),
    (["name=a/b"], ["name=a/b"]),
    # Found only when the Trainer is built, which makes folders.
    (["method=sgd", "algorithms.sassha={}"], ["LazyHessian", "SGD"]),
    (["method=sam", "algorithms.sassha={}"], ["perturbed twice"]),
    (
        ["method=sam", "optimizer={name: sassha}"],
        ["algorithms", "SASSHA needs a Hessian", "algorithms.sassha={}"],
    ),
]


def refused(argv: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line that the command says when it refuses."""
    assert train(argv) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.endswith("\n") and err.count("\n") == 1
    return err


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(("argv", "parts"), MISTAKES, ids=[" ".join(argv) for argv, _ in MISTAKES])
def test_a_mistake_is_one_line_and_writes_nothing(
    argv: list[str], parts: list[str], folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    message = refused(argv, capsys)
    assert all(part in message for part in parts), message
    assert not list(folder.iterdir())


@pytest.mark.parametrize(
    ("content", "part"),
    [
        ("name: [x\n a: b", "not valid YAML"),
        ("a: 1\na: 2", "duplicate"),
        ("- 1", "mapping"),
        ("", "method"),
        ("methods: {a: {}, b: {}}", "there are: a, b"),
        ("method: sgd\nmethods: {sgd: 3}", "methods.sgd"),
        ("method: sgd\nmethods: {}", "sgd"),
        ("method: sgd\nname: x", "must set it"),
    ],
)
def test_a_malformed_recipe_is_one_line(
    content: str, part: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("recipe.yaml").write_text(content)
    assert part in refused(["recipe.yaml"], capsys)
    assert [path.name for path in folder.iterdir()] == ["recipe.yaml"]


@pytest.mark.parametrize("package", ["sklearn", "matplotlib"])
def test_a_missing_optional_package_is_one_line(
    package: str, folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    message = refused(QUICK, capsys)
    assert package in message and "pip install 'composer_sassha[demo]'" in message
    assert not list(folder.iterdir())


def test_help_names_recipes_and_methods_without_importing_torch() -> None:
    code = "import sys; from composer_sassha.commands import main\ntry: main(['train', '--help'])\n"
    code += "finally: assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "digits                     sgd, adamw, sam, sam_adamw, asam, gsam" in done.stdout


@pytest.mark.parametrize("method", ["sgd", "adamw", "sam", "sassha"])
def test_a_run_leaves_everything_and_is_left_alone(
    method: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = [*QUICK, f"method={method}", "seed=3"]
    assert train(argv) == 0
    out, err = capsys.readouterr()
    assert err == ""
    lines = out.splitlines()
    assert lines[1].startswith("epoch   2/2  train loss ") and "  test accuracy " in lines[1]

    run = folder / "runs" / "digits" / method / "seed3"
    names = {"config.yaml", "metrics.jsonl", "results.json", "curves.png", "checkpoints", ".lock"}
    assert {path.name for path in run.iterdir()} == names
    assert len(list((run / "checkpoints").glob("ep*.pt"))) == 1

    results = json.loads((run / "results.json").read_text())
    expected = {"recipe": "digits", "method": method, "seed": 3, "steps": 22, "epochs": 2, "world_size": 1}
    assert results.items() >= (expected | {"reported": None, "heldout": "test"}).items()
    assert 0 <= results["accuracy"] <= 1 and results["loss"] > 0
    assert results["seconds"] > 0 and results["seconds_per_step"] > 0 and results["parameters"] > 0
    assert f"test accuracy {results['accuracy']:.2%}" in lines[2]

    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [record for record in records if "loss/train/total" in record]
    assert [record["batch"] for record in steps] == list(range(1, 23))
    assert [record["epoch"] for record in steps] == [0] * 11 + [1] * 11
    assert all(record["seconds"] > 0 and record["processor_seconds"] > 0 for record in steps)
    blocks = [fmean(record["processor_seconds"] for record in steps[5:])]
    assert results["processor_seconds_per_step"] == pytest.approx(median(blocks))
    evaluations = [record for record in records if "metrics/test/MulticlassAccuracy" in record]
    assert [(record["batch"], record["epoch"]) for record in evaluations] == [(11, 1), (22, 2)]
    assert evaluations[-1]["metrics/test/MulticlassAccuracy"] == results["accuracy"]

    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    assert train(argv) == 0
    assert capsys.readouterr().out.splitlines() == lines[2:]
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before


MEASURES = "{eigenvalues: 1, trace_samples: 0, m: [], directions: 0}"
MONITOR = f"callbacks.sharpness_monitor={{interval: 4ba, batches: 1, measures: {MEASURES}}}"
EPOCHS = MONITOR.replace("4ba", "1ep")


def test_a_run_is_watched_by_a_callback_and_does_not_change(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
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

    with_it, without = (
        [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()] for run in runs
    )
    measured = [record for record in with_it if "sharpness/lambda_max" in record]
    # In the records of the steps, and at the end of the training, which is that of an epoch, in its own.
    clocks = [(record["batch"], record["epoch"], "seconds" in record) for record in measured]
    assert clocks == [(k, k // 12, True) for k in (4, 8, 12, 16, 20)] + [(22, 2, False)]
    (spectrum,) = (record for record in with_it if "sharpness/spectrum" in record)
    assert (spectrum["batch"], spectrum["epoch"], len(spectrum["sharpness/spectrum"])) == (11, 1, 12)
    names = {*measured[-1], *spectrum} - {"batch", "epoch"}
    names |= (times := {"seconds", "processor_seconds"})
    left = [{key: value for key, value in r.items() if key not in names} for r in with_it]
    assert [r for r in left if r.keys() != {"batch", "epoch"}] == [
        {key: value for key, value in r.items() if key not in times} for r in without
    ]
    assert with_it[-1]["metrics/test/CrossEntropy"] == pytest.approx(measured[-1]["sharpness/loss"], rel=1e-5)


def test_callbacks_that_come_too_late_are_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    quick = [*QUICK, "max_duration=1ba"]
    run = folder / "runs/digits/sgd/seed0"
    assert train(quick) == 0
    text = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(text.replace("callbacks: {}\n", ""))  # as before there were any
    assert text != (run / "config.yaml").read_text()
    capsys.readouterr()
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert train(quick) == 0
    capsys.readouterr()
    for finished in (True, False):
        message = refused([*quick, MONITOR], capsys)
        assert "without the callbacks given here" in message and "save_folder" in message
        assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
        if finished:
            before.pop(run / "results.json")
            (run / "results.json").unlink()
    (run / "checkpoints/latest-rank0.pt").unlink()
    for path in (run / "checkpoints").iterdir():
        path.unlink()
    assert train([*quick, MONITOR]) == 0  # it had nothing to lose
    assert "sharpness/lambda_max" in (run / "metrics.jsonl").read_text()
    assert train([*quick, MONITOR]) == 0 and train(quick) == 0  # the same run, with them or not
    assert "with another" not in capsys.readouterr().err
    assert "without the callbacks" in refused([*quick, EPOCHS], capsys)


def test_the_baseline_is_compared_with_when_it_is_there(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    quick = ["max_duration=1ba", "method=sam"]
    train(quick)
    assert "times sgd's" not in capsys.readouterr().out
    for seed in range(2):
        train([*quick, "method=sgd", f"seed={seed}"])
    capsys.readouterr()
    train(quick)
    seconds = {
        run.parts[-3]: json.loads(run.read_text())["processor_seconds_per_step"]
        for run in Path("runs/digits").glob("*/seed0/results.json")
    }
    other = json.loads(Path("runs/digits/sgd/seed1/results.json").read_text())["processor_seconds_per_step"]
    ratio = seconds["sam"] / ((seconds["sgd"] + other) / 2)
    assert f"({ratio:.2f} times sgd's)" in capsys.readouterr().out


def test_the_resolved_config_repeats_the_run(folder: Path) -> None:
    train([*QUICK, "max_duration=3ba", "data.shift=1"])
    train(["runs/digits/sgd/seed0/config.yaml", "save_folder=again"])
    first, again = (
        json.loads(Path(root, "digits/sgd/seed0/results.json").read_text()) for root in ("runs", "again")
    )
    assert first["loss"] == again["loss"]


def test_a_folder_with_another_run_is_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    quick = [*QUICK, "max_duration=1ba"]
    train(quick)
    capsys.readouterr()
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    message = refused([*quick, "optimizer.lr=0.5"], capsys)
    assert "optimizer.lr (" in message and "there, 0.5 here)" in message and "save_folder" in message
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    assert train([*quick, "progress_bar=true", "baseline=adamw"]) == 0  # neither changes the result


def test_a_folder_that_is_not_a_run_is_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    thesis = folder / "runs" / "digits" / "sgd" / "seed0" / "thesis.txt"
    thesis.parent.mkdir(parents=True)
    thesis.write_text("precious")
    assert "not a run" in refused(QUICK, capsys)
    assert list(thesis.parent.iterdir()) == [thesis]


def test_two_ranks_do_the_same_job(folder: Path) -> None:
    command = [Path(sys.executable).with_name("composer"), "-n", "2", "-m", "composer_sassha", "train"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(
        [*command, *QUICK, "method=sassha", EPOCHS], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("epoch   2/2") == 1
    results = json.loads(Path("runs/digits/sassha/seed0/results.json").read_text())
    assert results["world_size"] == 2 and results["steps"] == 22
    assert results["accuracy"] > 0.3  # a tenth would be chance
    lines = Path("runs/digits/sassha/seed0/metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    losses = [r["sharpness/loss"] for r in records if "sharpness/lambda_max" in r]
    evaluated = [r["metrics/test/CrossEntropy"] for r in records if "metrics/test/CrossEntropy" in r]
    assert len(losses) == 2 and losses == pytest.approx(evaluated, rel=1e-5)


def train_in(folder: Path, argv: list[str]) -> None:
    os.chdir(folder)
    sys.exit(train(argv))


@pytest.mark.parametrize(("sent", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_stops_the_run_and_says_how_to_go_on(
    folder: Path, sent: signal.Signals, status: int
) -> None:
    log = folder / "log"
    (process,) = start(1, log, train_in, folder, [*QUICK, "max_duration=500ep"])
    metrics = folder / "runs/digits/sgd/seed0/metrics.jsonl"
    while process.is_alive() and not (metrics.exists() and metrics.read_text().count("\n") > 3):
        time.sleep(0.1)
    os.kill(process.pid, sent)
    process.join(60)
    assert process.exitcode == status
    err = log.read_text()
    assert err == "interrupted; the same command continues the run from its last checkpoint, if it has one\n"


def unfinished(folder: Path) -> Path:
    """A run of two epochs that lacks its results, as if it had been stopped in the second."""
    assert train(QUICK) == 0
    run = folder / "runs/digits/sgd/seed0"
    (run / "results.json").unlink()
    return run


def test_a_run_that_another_process_trains_is_refused(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = unfinished(folder)
    before = (run / "metrics.jsonl").read_bytes()
    capsys.readouterr()
    with FileLock(run / ".lock"):
        assert "another process trains this run" in refused(QUICK, capsys)
    assert (run / "metrics.jsonl").read_bytes() == before
    assert train(QUICK) == 0


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda run: cut(newest(run)), ["ep2-ba22-rank0.pt", "cannot be loaded", "start again"]),
        (lambda run: cut(run / "metrics.jsonl"), ["metrics.jsonl", "restore it"]),
        (lambda run: (run / "metrics.jsonl").write_text("x\n" * 100), ["metrics.jsonl", "line 1 is damaged"]),
        (lambda run: (run / "results.json").write_text("{"), ["results.json", "is damaged; delete it"]),
        (lambda run: (run / "results.json").write_text("[]"), ["results.json", "is damaged; delete it"]),
        (lambda run: (run / "config.yaml").write_text("model: 3"), ["cannot be read", "save_folder"]),
    ],
)
def test_a_damaged_run_is_named_and_kept(
    damage: Callable[[Path], object], said: list[str], folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = unfinished(folder)
    damage(run)
    capsys.readouterr()
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    message = refused(QUICK, capsys)
    assert all(part in message for part in said), message
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def newest(run: Path) -> Path:
    return (run / "checkpoints/latest-rank0.pt").resolve()


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize("dangling", [True, False])
def test_a_lost_link_to_the_newest_checkpoint_is_made_anew(dangling: bool, folder: Path) -> None:
    run = unfinished(folder)
    before = (run / "metrics.jsonl").read_text()
    link = run / "checkpoints/latest-rank0.pt"
    link.unlink()
    if dangling:
        link.symlink_to("ep1-ba11-rank0.pt")
    assert train(QUICK) == 0
    assert (run / "metrics.jsonl").read_text() == before  # nothing was trained again
    assert json.loads((run / "results.json").read_text())["steps"] == 22


def test_a_damaged_baseline_does_not_hurt_another_run(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(QUICK) == 0
    (folder / "runs/digits/sgd/seed0/results.json").write_text("{")
    assert train([*QUICK, "method=adamw"]) == 0
    assert "times sgd's" not in capsys.readouterr().out


def test_a_run_that_diverges_says_so(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train([*QUICK, "optimizer.lr=1e30"]) == 0
    assert "diverged" in capsys.readouterr().out


def test_only_the_first_rank_speaks(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "1")
    assert train(["seed=abc"]) == 2
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("mistake", "mended", "parts"),
    [
        (["method=esam", "algorithms.esam.input_key=x"], ["method=esam"], ["ESAM", "input_key='x'"]),
        (
            ["method=gsam", "schedules.rho_max={name: cosine}"],
            ["method=gsam"],
            ["Schedule", "rho_max", "rho_min"],
        ),
        (
            ["method=sassha", "schedules.hessian_power={name: linear, alpha_f: 3}"],
            ["method=sassha", "schedules.hessian_power={name: linear, alpha_f: 2}"],
            ["Schedule", "hessian_power", "[0, 1]"],
        ),
    ],
)
def test_a_mistake_that_shows_with_the_first_step_is_one_line_and_can_be_mended(
    mistake: list[str], mended: list[str], parts: list[str], folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    quick = ["max_duration=20ba", "progress_bar=false"]
    message = refused([*mistake, *quick], capsys)
    assert all(part in message for part in parts), message
    assert train([*mended, *quick]) == 0
