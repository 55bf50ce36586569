"""The comparison of a recipe's methods: what it runs, what it says, and what it leaves on the disk."""

import base64
import csv
import json
import math
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import yaml
from matplotlib.colors import to_hex
from omegaconf import OmegaConf
from scipy.stats import t

from composer_sassha.comparison import jobs
from composer_sassha.comparison.curves import Curve, plot_curves
from composer_sassha.comparison.grid import load_grid
from composer_sassha.comparison.jobs import Job, run_jobs
from composer_sassha.comparison.pareto import Outcome, pareto_front, plot_pareto_front
from composer_sassha.recipes.config import Recipe
from composer_sassha.recipes.files import bundled_recipes
from composer_sassha.recipes.metrics import METRICS, ranked
from tests.commands import SMALL, compare, train
from tests.distributed.launch import launches

REPORT = {"table.md", "table.csv", "curves.png", "frontier.png", "report.html"}
MISTAKES = [
    (["digits", "--methods", "sgd,sasha"], ["--methods", "'sasha'", "did you mean sassha?"]),
    (["digits", "--methods", "sgd,"], ["--methods", "'sgd,'", "commas"]),
    (["digits", "--seeds", "0,x"], ["--seeds", "'0,x'", "0,1,2"]),
    (["digits", "--seeds", "0,-1"], ["--seeds", "'0,-1'", "0,1,2"]),
    (["digits", "--seeds", ""], ["--seeds", "''", "0,1,2"]),
    (["digits", "--seeds", "4294967296"], ["--seeds", "4294967296", "2**32"]),
    (["digits", "--jobs", "0"], ["--jobs", "'0'", "from 1"]),
    (["digits", "--jobs", "two"], ["--jobs", "'two'", "from 1"]),
    (["digit"], ["digit", "did you mean digits?"]),
    ([], ["RECIPE", "not given", "digits"]),
    (["max_duration=1ep"], ["RECIPE", "not given", "digits"]),
    (["digits", "seed=1"], ["seed=1", "--seeds"]),
    (["digits", "method=sgd"], ["method=sgd", "--methods"]),
    (["digits", "max_duration=30"], ["max_duration=30", "30ep"]),
    (["digits", "data.batchsize=1"], ["data.batchsize", "did you mean data.batch_size?"]),
    (["digits", "--tabel"], ["--tabel"]),
]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
    return tmp_path


def files(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


def refused(argv: list[str], folder: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """The one line that the command says when it refuses, having written nothing."""
    before = files(folder)
    assert compare(argv) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.endswith("\n") and err.count("\n") == 1
    assert files(folder) == before
    return err


def pretend(recipe: Recipe, accuracy: list[float], loss: float | None = 0.5, **results: Any) -> None:
    """Make the folder of a finished run with these accuracies after each epoch of two steps."""
    recipe.folder.mkdir(parents=True)
    (recipe.folder / "config.yaml").write_text(yaml.safe_dump(recipe.settings()))
    records: list[dict[str, Any]] = []
    for epoch, value in enumerate(accuracy):
        records += [{"batch": 2 * epoch + i, "epoch": epoch, "seconds": 0.5} for i in (1, 2)]
        evaluated = {"metrics/test/MulticlassAccuracy": value, "metrics/test/CrossEntropy": loss}
        records.append({"batch": 2 * epoch + 2, "epoch": epoch + 1, **evaluated})
    (recipe.folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    final = {"accuracy": accuracy[-1], "loss": loss, "heldout": "test", "seconds": 9.0, "steps": len(records)}
    final |= {"seconds_per_step": 0.1, "world_size": 1, "device": "cpu"} | results
    (recipe.folder / "results.json").write_text(json.dumps(final))


def pretend_grid(accuracies: dict[str, list[float]], **results: Any) -> None:
    for method, values in accuracies.items():
        for recipe, value in zip(load_grid("digits", [method], range(len(values))), values, strict=True):
            pretend(recipe, [0.5, value], **results)


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|\n").split("|")]


def table(text: str) -> dict[str, dict[str, str]]:
    """The rows of the first Markdown table, by method, each by column."""
    lines = [line for line in text[text.index("| method") :].split("\n\n")[0].splitlines() if "|" in line]
    head = cells(lines[0])
    return {row[0]: dict(zip(head, row, strict=True)) for row in map(cells, lines[2:])}


def test_a_mistake_is_one_line_and_writes_nothing(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for argv, parts in MISTAKES:
        message = refused(argv, folder, capsys)
        assert all(part in message for part in parts), (argv, message)


def test_a_launcher_is_refused(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "without a launcher" in refused(["digits"], folder, capsys)


@pytest.mark.parametrize("package", ["scipy", "jinja2", "matplotlib", "tabulate"])
def test_a_missing_optional_package_is_one_line(
    package: str, folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = ("composer_sassha.comparison.", "composer_sassha.inspection.", "composer_sassha.reporting.")
    for name in [n for n in sys.modules if n.startswith((package, *ours))]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    message = refused(["digits"], folder, capsys)
    assert package in message and "pip install 'composer_sassha[demo]'" in message


def test_help_comes_without_importing_torch() -> None:
    code = "import sys; from composer_sassha.commands import main\ntry: main(['compare', '--help'])\n"
    code += "finally: assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "--methods A,B" in done.stdout and "--table" in done.stdout


@launches
@pytest.mark.usefixtures("undrawn")
def test_a_comparison_reports_a_failing_run_and_goes_on(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    quick = [*SMALL, "max_duration=2ep", "save_interval=1ep"]
    command = ["digits", "--methods", "sgd,sam", "--seeds", "0,1", "--jobs", "2", *quick]
    grid = load_grid("digits", ["sgd", "sam"], [0, 1], quick)
    for recipe, accuracy in zip(grid[:-1], (0.2, 0.3, 0.25), strict=True):
        pretend(recipe, [0.1, accuracy], seconds_per_step=accuracy)
    assert train(["digits", *quick, "method=sam", "seed=1"]) == 0
    runs = folder / "runs/digits"
    stopped = runs / "sam/seed1"
    (stopped / "results.json").unlink()  # as if stopped after the last checkpoint
    records = (stopped / "metrics.jsonl").read_text()
    finished = {path: when for path, when in files(runs).items() if stopped not in (path, *path.parents)}
    del finished[runs / "sgd"], finished[runs / "sam"]  # which get logs
    capsys.readouterr()

    python = folder / "python"
    python.write_text("#!/bin/sh\necho out of luck; exit 3\n")
    python.chmod(0o755)
    with monkeypatch.context() as patched:
        patched.setattr(sys, "executable", str(python))
        assert compare(command) == 1
    out, err = capsys.readouterr()
    log = Path("runs/digits/sam/seed1.log")
    assert err == f"sam seed 1 failed: out of luck (all of its output: {log})\n"
    assert log.read_text() == "out of luck\n"
    assert "1/1 sam seed 1: failed" in out and "- Missing: sam seed 1 (unfinished, 10 steps)." in out
    assert {path.name for path in runs.iterdir()} == {"sgd", "sam", *REPORT}

    assert compare(command) == 0
    out, err = capsys.readouterr()
    assert err == "" and "Missing" not in out and not log.exists()
    assert "1/1 sam seed 1: test accuracy" in out
    assert (stopped / "metrics.jsonl").read_text() == records  # nothing was trained again
    assert {path.name for path in runs.iterdir()} == {"sgd", "sam", *REPORT}
    assert {path: path.stat().st_mtime_ns for path in finished} == finished
    check_against_results(out, runs)

    before = files(runs)
    assert compare([*command, "--table"]) == 0
    assert table(capsys.readouterr().out) == table(out[out.rindex("| method") :])
    assert files(runs) == before


def check_against_results(out: str, runs: Path) -> None:
    """The printed table and table.csv say what results.json add up to."""
    results = {
        method: [json.loads(path.read_text()) for path in sorted(runs.glob(f"{method}/seed*/results.json"))]
        for method in ("sgd", "sam")
    }
    printed = table(out[out.rindex("| method") :])
    numbers = {row["method"]: row for row in csv.DictReader((runs / "table.csv").read_text().splitlines())}
    base = statistics.median(one["seconds_per_step"] for one in results["sgd"])
    for method, seeds in results.items():
        accuracy, loss = [100 * one["accuracy"] for one in seeds], [one["loss"] for one in seeds]
        said, row = printed[method], numbers[method]
        assert said["seeds"] == "2"
        shown = f"{statistics.mean(accuracy):.2f} ± {statistics.stdev(accuracy):.2f}"
        assert said["test accuracy, %"].strip("*") == shown
        assert said["test loss"].strip("*") == f"{statistics.mean(loss):.4f} ± {statistics.stdev(loss):.4f}"
        assert float(row["loss_mean"]) == pytest.approx(statistics.mean(loss))
        assert float(row["accuracy_percent_std"]) == pytest.approx(statistics.stdev(accuracy))
        costs = [one["seconds_per_step"] / base for one in seeds]
        assert said["step / sgd's (range)"] == (
            f"{statistics.median(costs):.2f} ({min(costs):.2f} to {max(costs):.2f})"
        )


def test_means_deviations_and_tests(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    accuracies = {"sgd": [0.90, 0.91, 0.92], "sam": [0.95, 0.97, 0.96], "asam": [0.96, 0.93, 0.97]}
    pretend_grid(accuracies)
    assert compare(["digits", "--methods", "sgd,sam,asam,gsam", "--table"]) == 0
    out = capsys.readouterr().out
    rows = table(out)
    assert rows["sgd"]["test accuracy, %"] == "91.00 ± 1.00"
    assert rows["sam"]["test accuracy, %"] == "**96.00 ± 1.00**"
    assert rows["asam"]["test accuracy, %"] == "95.33 ± 2.08"
    assert rows["sam"]["p (against sam)"] == "best"
    best = [100 * value for value in accuracies["sam"]]
    for method, mark in (("sgd", "*"), ("asam", " n.s.")):
        assert (
            rows[method]["p (against sam)"]
            == f"{by_hand([100 * v for v in accuracies[method]], best):.2g}{mark}"
        )
    assert rows["gsam"] == dict.fromkeys(rows["gsam"], "-") | {"method": "gsam", "seeds": "0 of 3"}
    assert "significant (*) is p < 0.05/2 = 0.025" in out
    assert "- Significantly different from sam: sgd." in out
    assert "- Not significantly different from sam: asam." in out
    assert "- Too few seeds for a test (n < 2): gsam." in out
    assert "- Missing: gsam seeds 0, 1, 2 (not begun)." in out


def by_hand(first: list[float], second: list[float]) -> float:
    """Welch's test, from its definition."""
    parts = [statistics.variance(values) / len(values) for values in (first, second)]
    statistic = (statistics.mean(first) - statistics.mean(second)) / math.sqrt(sum(parts))
    freedom = sum(parts) ** 2 / sum(p**2 / (len(v) - 1) for p, v in zip(parts, (first, second), strict=True))
    return 2 * t.sf(abs(statistic), freedom)


def test_one_seed_is_not_tested(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pretend_grid({"sgd": [0.9], "sam": [0.95]})
    assert compare(["digits", "--methods", "sgd,sam", "--seeds", "0", "--table"]) == 0
    out = capsys.readouterr().out
    assert table(out)["sam"]["test accuracy, %"] == "**95.00**"
    assert table(out)["sgd"]["p (against sam)"] == "-"
    assert "- Too few seeds for a test (n < 2): sgd, sam." in out and "Welch" not in out


def test_a_method_that_lacks_seeds_is_not_called_the_best(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pretend_grid({"sgd": [0.9, 0.91], "sam": [0.99]})
    assert compare(["digits", "--methods", "sgd,sam", "--seeds", "0,1", "--table"]) == 0
    rows = table(capsys.readouterr().out)
    assert rows["sgd"]["p (against sgd)"] == "best" and rows["sam"]["seeds"] == "1 of 2"


def test_equal_accuracies_are_told_apart_by_the_loss(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pretend_grid({"sgd": [0.9, 0.9]}, loss=0.5)
    pretend_grid({"sam": [0.9, 0.9]}, loss=0.4)
    assert compare(["digits", "--methods", "sgd,sam", "--seeds", "0,1", "--table"]) == 0
    out = capsys.readouterr().out
    rows = table(out)
    assert [row["test accuracy, %"] for row in rows.values()] == ["**90.00 ± 0.00**"] * 2
    assert rows["sam"]["test loss"] == "**0.4000 ± 0.0000**" and rows["sam"]["p (against sam)"] == "best"
    assert "- No test, as the seeds do not vary: sgd." in out


@pytest.mark.usefixtures("undrawn")
def test_what_shall_be_low_is_ranked_the_other_way(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    perplexities = {"sgd": [5.0, 5.2, 5.1], "sam": [4.0, 4.1, 4.2], "asam": [4.2, 3.9, 4.5]}
    pretend_grid(perplexities)
    names = {"MulticlassAccuracy": "LanguagePerplexity", "CrossEntropy": "LanguageCrossEntropy"}
    for path in Path("runs/digits").glob("*/seed*/results.json"):
        results = json.loads(path.read_text())
        results |= {"perplexity": results.pop("accuracy"), "metrics": [*names.values()]}
        path.write_text(json.dumps(results))
        records = path.with_name("metrics.jsonl")
        text = records.read_text()
        for before, after in names.items():
            text = text.replace(f"/{before}", f"/{after}")
        records.write_text(text)
    recipe = OmegaConf.to_container(OmegaConf.load(bundled_recipes()["digits"]))
    recipe["methods"]["sam"] |= {"reported": 3.9}
    Path("own.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    for path in Path("runs/digits").glob("sam/seed*/config.yaml"):
        path.write_text(path.read_text().replace("reported: null", "reported: 3.9"))
    assert compare(["own.yaml", "--methods", "sgd,sam,asam"]) == 0
    out = capsys.readouterr().out
    rows = table(out.split("\n\n\n")[1])
    assert {method: row["test perplexity"] for method, row in rows.items()} == {
        "sgd": "5.100 ± 0.100",
        "sam": "**4.100 ± 0.100**",
        "asam": "4.200 ± 0.300",
    }
    assert rows["sam"]["published"] == "3.900" and rows["sam"]["p (against sam)"] == "best"
    p = by_hand(perplexities["sgd"], perplexities["sam"])
    assert rows["sgd"]["p (against sam)"] == f"{p:.2g}*" and rows["asam"]["p (against sam)"].endswith(" n.s.")
    assert "Welch's t-test of the perplexity against sam's" in out and "accuracy" not in out
    numbers = {
        row["method"]: row for row in csv.DictReader(Path("runs/digits/table.csv").read_text().splitlines())
    }
    assert float(numbers["sam"]["perplexity_mean"]) == pytest.approx(4.1)
    assert numbers["sam"]["reported"] == "3.9" and "reported_percent" not in numbers["sam"]
    assert (Path("runs/digits") / "curves.png").exists()


def test_divergence_skipped_steps_and_other_machines_are_told(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pretend_grid({"sgd": [0.9]}, seconds_per_step=0.2)
    pretend_grid({"sam": [0.1]}, loss=None, seconds_per_step=0.3)
    pretend_grid({"asam": [0.8]}, device="gpu")
    with Path("runs/digits/sam/seed0/metrics.jsonl").open("a") as metrics:
        metrics.write('{"batch": 4, "epoch": 2, "sharpness/skipped_steps": 7}\n' * 2)
    assert compare(["digits", "--methods", "sgd,sam,asam", "--seeds", "0", "--table"]) == 0
    out = capsys.readouterr().out
    rows = table(out)
    assert rows["sam"]["test loss"] == "not finite" and rows["sgd"]["test loss"] == "**0.5000**"
    assert "- Diverged, the loss is not finite: sam seed 0." in out
    assert (rows["sam"]["skipped"], rows["sgd"]["skipped"]) == ("2", "0")
    assert (rows["sam"]["step / sgd's (range)"], rows["asam"]["step / sgd's (range)"]) == ("1.50", "-")
    assert "warning: device differs: cpu (sgd, sam), gpu (asam)" in out
    assert compare(["digits", "--methods", "sam", "--seeds", "0", "--table"]) == 0
    assert "No relative times: sgd, the baseline" in capsys.readouterr().out


def test_settings_that_should_be_the_same_are_warned_of(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = OmegaConf.to_container(OmegaConf.load(bundled_recipes()["digits"]))
    methods = {name: recipe["methods"][name] for name in ("sgd", "sam")}
    methods["sgd"] |= {"reported": 99.5}
    methods["sam"] |= {
        "max_duration": "60ep",
        "data": {"batch_size": 64},
        "schedules": {"rho": {"name": "cosine"}},
    }
    Path("own.yaml").write_text(yaml.safe_dump(recipe | {"methods": methods, "name": "own"}, sort_keys=False))
    assert compare(["own.yaml", "--table"]) == 0
    out = capsys.readouterr().out
    assert "warning: max_duration differs: 30ep (sgd), 60ep (sam)" in out
    assert "warning: data.batch_size differs: 128 (sgd), 64 (sam)" in out
    assert out.count("warning") == 2 and "All other settings are the same" not in out
    settings = table(out[out.rindex("| method") :])
    assert settings["sgd"]["optimizer"] == "sgd(lr=0.3, weight_decay=0.002)"
    assert settings["sam"]["algorithms"] == "sam(rho=0.05)"
    assert settings["sam"]["schedules"].startswith("rho: cosine(")
    assert table(out)["sgd"]["published"] == "99.50" and table(out)["sam"]["published"] == "-"

    assert compare(["digits", "--table", "--methods", "sgd,sam"]) == 0
    out = capsys.readouterr().out
    assert "warning" not in out and "All other settings are the same" in out and "published" not in out


def test_other_algorithms_and_tuning_should_be_every_methods(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = OmegaConf.to_container(OmegaConf.load(bundled_recipes()["digits"]))
    clipping = {"gradient_clipping": {"clipping_type": "norm", "clipping_threshold": 1.0}}
    methods = {name: dict(recipe["methods"][name]) for name in ("sgd", "sam", "adamw")}
    methods["sam"] |= {"algorithms": {"sam": {"rho": 0.1}, **clipping}, "tuning_runs": 12}
    methods["adamw"] |= {"tuning_runs": None}
    own = recipe | {"methods": methods, "name": "own", "algorithms": {"label_smoothing": {"smoothing": 0.1}}}
    Path("own.yaml").write_text(yaml.safe_dump(own, sort_keys=False))
    assert compare(["own.yaml", "--table"]) == 0
    out = capsys.readouterr().out
    assert [line for line in out.splitlines() if "warning" in line] == [
        "warning: tuning_runs differs: 36 (sgd), 12 (sam), None (adamw)",
        "warning: algorithms.gradient_clipping differs: not there (sgd, adamw), "
        "gradient_clipping(clipping_type=norm, clipping_threshold=1.0) (sam)",
    ]
    assert {method: row["tuning runs"] for method, row in table(out[out.rindex("| method") :]).items()} == {
        "sgd": "36",
        "sam": "12",
        "adamw": "-",
    }
    everywhere = [
        "algorithms.gradient_clipping={clipping_type: norm, clipping_threshold: 2.0}",
        "tuning_runs=null",
    ]
    assert compare(["own.yaml", "--table", *everywhere]) == 0
    out = capsys.readouterr().out
    assert "warning" not in out and "tuning runs" not in out


def test_methods_that_finished_other_seeds_are_warned_of(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pretend_grid({"sgd": [0.9, 0.91], "sam": [0.95, 0.97]})
    command = ["digits", "--methods", "sgd,sam,asam", "--seeds", "0,1", "--table"]
    assert compare(command) == 0
    assert "warning" not in capsys.readouterr().out  # one that has none finished shows no numbers
    Path("runs/digits/sam/seed0/results.json").unlink()
    assert compare(command) == 0
    assert "warning: the set of finished seeds differs: 0, 1 (sgd), 1 (sam)" in capsys.readouterr().out


def test_a_number_of_tuning_runs_does_not_make_another_run(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pretend_grid({"sgd": [0.9]})
    assert compare(["digits", "--methods", "sgd", "--seeds", "0", "--table", "tuning_runs=5"]) == 0
    assert table(capsys.readouterr().out)["sgd"]["seeds"] == "1"


def test_callbacks_make_no_other_run_and_no_unfair_comparison(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = OmegaConf.to_container(OmegaConf.load(bundled_recipes()["digits"]))
    methods = {name: dict(recipe["methods"][name]) for name in ("sgd", "sam")}
    methods["sam"] |= {"callbacks": {"sharpness_monitor": {"interval": "5ep"}}}
    Path("own.yaml").write_text(yaml.safe_dump(recipe | {"methods": methods}, sort_keys=False))
    assert compare(["own.yaml", "--table"]) == 0
    out = capsys.readouterr().out
    assert "warning" not in out and "All other settings are the same" in out
    (watched,) = load_grid("digits", ["sgd"], [0], ["callbacks.sharpness_monitor={}"])
    pretend(watched, [0.5, 0.9])
    assert compare(["digits", "--methods", "sgd", "--seeds", "0", "--table"]) == 0
    assert table(capsys.readouterr().out)["sgd"]["seeds"] == "1"


class Page(HTMLParser):
    """What a page loads or links to, its unclosed tags, and the text of its cells."""

    def __init__(self) -> None:
        super().__init__()
        self.links: list[str] = []
        self.open: list[str] = []
        self.cells: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.links += [value or "" for name, value in attrs if name in ("src", "href", "srcset", "data")]
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "td" in self.open:
            self.cells.append(data)


def test_the_report_is_one_page_that_needs_nothing_else(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pretend_grid({"sgd": [0.9, 0.91], "sam": [0.95, 0.97]})
    assert compare(["digits", "--methods", "sgd,sam", "--seeds", "0,1"]) == 0
    said = table(capsys.readouterr().out.split("\n\n\n")[1])
    assert table(Path("runs/digits/table.md").read_text()) == said
    text = Path("runs/digits/report.html").read_text(encoding="utf-8")
    page = Page()
    page.feed(text)
    assert page.open == [] and len(page.links) == 2  # the curves and the Pareto front
    for link, name in zip(page.links, ("curves.png", "frontier.png"), strict=True):
        assert (
            base64.b64decode(link.removeprefix("data:image/png;base64,"))
            == Path("runs/digits", name).read_bytes()
        )
    assert "http" not in text and "@import" not in text and "url(" not in text
    for row in said.values():
        assert all(cell.strip("*") in page.cells for cell in row.values())
    assert "sam seed 1" in page.cells and "sam(rho=0.05)" in page.cells
    assert "python -m composer_sassha compare digits --methods sgd,sam --seeds 0,1" in text


def test_a_run_with_other_settings_is_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pretend_grid({"sgd": [0.9]})
    for more in ([], ["--table"]):
        message = refused(["digits", "--methods", "sam,sgd", "optimizer.lr=0.7", *more], folder, capsys)
        assert "sgd/seed0" in message and "optimizer.lr (0.3 there, 0.7 here)" in message


@pytest.mark.usefixtures("undrawn")
def test_a_recipe_without_methods_is_one_row(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pretend_grid({"sam": [0.9, 0.92]})
    config = "runs/digits/sam/seed0/config.yaml"
    assert compare([config, "--seeds", "0,1"]) == 0
    assert table(Path("runs/digits/table.md").read_text())["sam"]["test accuracy, %"] == "**91.00 ± 1.41**"
    capsys.readouterr()
    assert "'sgd'" in refused([config, "--methods", "sgd"], folder, capsys)


@pytest.mark.parametrize(
    ("stop", "status"), [(KeyboardInterrupt(), 130), (SystemExit(130), 130), (SystemExit(143), 143)]
)
def test_an_interruption_says_how_to_go_on(
    stop: BaseException,
    status: int,
    folder: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def interrupted(*arguments: Any) -> None:
        raise stop

    monkeypatch.setattr("composer_sassha.commands.compare._train", interrupted)
    assert compare(["digits", "--methods", "sgd"]) == status
    assert (
        capsys.readouterr().err
        == "interrupted; the same command goes on, and --table shows what is finished\n"
    )
    assert files(folder) == {}


def job(name: str, script: str, folder: Path) -> Job:
    return Job(name, ["sh", "-c", script], folder / f"{name}.log")


def test_why_jobs_failed(tmp_path: Path) -> None:
    failures = run_jobs(
        [
            job("refused", "echo lr=-1 must not be; exit 2", tmp_path),
            job("killed", "echo epoch 3; kill -9 $$", tmp_path),
            job("silent", "exit 1", tmp_path),
            job("good", f"touch {tmp_path / 'done'}", tmp_path),
        ],
        at_once=2,
    )
    assert failures == {
        "refused": "lr=-1 must not be",
        "killed": f"killed by SIGKILL; its last line: epoch 3 (all of its output: {tmp_path / 'killed.log'})",
        "silent": f"no output (all of its output: {tmp_path / 'silent.log'})",
    }
    assert {path.name for path in tmp_path.iterdir()} == {"done", "killed.log", "silent.log"}


def test_as_many_jobs_run_at_once_as_asked_for(tmp_path: Path) -> None:
    # Each waits for the other: one at a time they would never end.
    meet = "touch {0}; for i in $(seq 100); do test -e {1} && exit 0; sleep 0.1; done; exit 1"
    pair = [
        job(a, f"cd {tmp_path}; {meet.format(a, b)}; echo $CUDA_VISIBLE_DEVICES > gpu_{a}", tmp_path)
        for a, b in ("ab", "ba")
    ]
    assert run_jobs(pair, at_once=2) == {}
    alone = "mkdir busy || exit 1; sleep 0.1; rmdir busy; echo $CUDA_VISIBLE_DEVICES > $0"
    one_by_one = [Job(n, ["sh", "-c", f"cd {tmp_path}; {alone}", n], tmp_path / f"{n}.log") for n in "cde"]
    assert run_jobs(one_by_one, at_once=1, devices=["5"]) == {}
    assert [(tmp_path / n).read_text() for n in "cde"] == ["5\n"] * 3


def test_an_interruption_stops_the_jobs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt_when_ready(seconds: float) -> None:
        if (tmp_path / "ready").exists():
            raise KeyboardInterrupt

    monkeypatch.setattr(jobs, "time", SimpleNamespace(sleep=interrupt_when_ready))
    script = f"cd {tmp_path}; trap 'touch stopped; exit 143' TERM; echo $$ > pid; touch ready; "
    script += "for i in $(seq 300); do sleep 0.1; done"
    with pytest.raises(KeyboardInterrupt):
        run_jobs([job("long", script, tmp_path), job("next", f"touch {tmp_path}/next", tmp_path)], at_once=1)
    assert (tmp_path / "stopped").exists() and not (tmp_path / "next").exists()
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)


WAITING = """
import os, pathlib, sys, time
pathlib.Path("pid").write_text(f"{os.getpid()} {sys.argv[1:]}")
try:
    time.sleep(600)
except SystemExit:
    pathlib.Path("told").touch()
"""
PARENT = """
import pathlib, signal, sys
from composer_sassha.comparison.jobs import Job, run_jobs
command = [sys.executable, "-m", "composer_sassha.comparison.tethered", "waiting", "a", "b=1"]
run_jobs([Job("waiting", command, pathlib.Path("log"))], at_once=1)
"""


def wait_for(condition: Callable[[], bool], seconds: float = 30) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end and not condition():
        time.sleep(0.05)
    return condition()


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


@launches
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks at /proc")
@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_job_ends_with_the_process_that_started_it(sent: signal.Signals, folder: Path) -> None:
    handler = "signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))\n"
    Path("waiting.py").write_text("import signal\n" + handler + WAITING)  # as Composer has one
    script = PARENT if sent == signal.SIGKILL else PARENT.replace("command =", handler + "command =", 1)
    with subprocess.Popen([sys.executable, "-c", script], stderr=subprocess.DEVNULL) as parent:
        assert wait_for(lambda: Path("pid").exists() and Path("pid").read_text() != "")
        pid, arguments = Path("pid").read_text().split(" ", 1)
        assert arguments == "['a', 'b=1']" and alive(int(pid))
        parent.send_signal(sent)
        parent.wait(timeout=60)
    ended = wait_for(lambda: not alive(int(pid)))
    if not ended:
        os.kill(int(pid), signal.SIGKILL)
    assert ended and Path("told").exists()


@pytest.mark.slow
@launches
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks at /proc")
@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_no_training_outlives_its_comparison(sent: signal.Signals, folder: Path) -> None:
    arguments = ["digits", "--methods", "sgd", "--seeds", "0", "max_duration=500ep", "progress_bar=false"]
    command = [sys.executable, "-m", "composer_sassha", "compare", *arguments]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        metrics = folder / "runs/digits/sgd/seed0/metrics.jsonl"
        assert wait_for(lambda: metrics.exists() and metrics.read_text().count("\n") > 3, seconds=200)
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        assert len(children) == 1
        process.send_signal(sent)
        _, err = process.communicate(timeout=60)
    assert process.returncode == {signal.SIGKILL: -9, signal.SIGTERM: 143, signal.SIGINT: 130}[sent]
    assert ("the same command goes on" in err) == (sent != signal.SIGKILL)
    ended = wait_for(lambda: not alive(int(children[0])))
    if not ended:
        os.kill(int(children[0]), signal.SIGKILL)
    assert ended


def test_curves_of_many_methods_can_be_told_apart() -> None:
    steps = np.array([10, 20, 30])
    values = np.array([[50.0, 80.0, 90.0], [60.0, 82.0, 94.0]])
    seconds = np.array([[1.0, 2.0, 3.0], [3.0, 4.0, 5.0]])
    curve = Curve(steps, steps / 10, seconds, {"accuracy": values, "loss": 1 / values})
    metrics = ranked(["MulticlassAccuracy", "CrossEntropy"])
    figure = plot_curves({f"method_{i}": curve for i in range(17)}, metrics, "test", "many")
    figure.draw_without_rendering()  # lays it out
    legend = figure.legends[0].get_window_extent()
    assert len(figure.legends[0].get_texts()) == 17
    assert figure.bbox.ymin <= legend.ymin and legend.xmax <= figure.bbox.xmax
    by_epoch, by_second = figure.axes[:2]
    for axes in figure.axes:
        assert axes.get_tightbbox().xmax <= legend.xmin
        assert (
            len({(to_hex(line.get_color()), str(line._unscaled_dash_pattern)) for line in axes.lines}) == 17
        )
    assert by_epoch.lines[0].get_xydata().tolist() == [[1, 55], [2, 81], [3, 92]]
    assert by_second.lines[0].get_xdata().tolist() == [2, 3, 4]
    assert by_epoch.collections[0].get_paths()[0].vertices.max() == pytest.approx(
        92 + np.std(values, ddof=1, axis=0)[2]
    )
    assert [axes.get_xlabel() for axes in figure.axes[2:]] == ["epochs", "seconds in training steps"]


def test_relative_times_are_the_processors_where_all_have_them(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def costs() -> dict[str, str]:
        assert compare(["digits", "--methods", "sgd,sam,asam,gsam", "--seeds", "0", "--table"]) == 0
        out = capsys.readouterr().out
        assert ("Relative times are of the processor" in out) is (len({*Path("runs/digits").iterdir()}) == 2)
        return {method: row["step / sgd's (range)"] for method, row in table(out).items()}

    pretend_grid({"sgd": [0.9]}, seconds_per_step=0.4, processor_seconds_per_step=0.1)
    pretend_grid({"sam": [0.9]}, seconds_per_step=0.2, processor_seconds_per_step=0.25)
    assert costs() == {"sgd": "1.00", "sam": "2.50", "asam": "-", "gsam": "-"}
    # One that an older version has trained, and one on two processes, whose baseline is missing.
    pretend_grid({"asam": [0.9]}, seconds_per_step=0.6)
    pretend_grid({"gsam": [0.9]}, seconds_per_step=0.6, processor_seconds_per_step=0.2, world_size=2)
    assert costs() == {"sgd": "1.00", "sam": "0.50", "asam": "1.50", "gsam": "-"}


@pytest.mark.parametrize("name", ["MulticlassAccuracy", "LanguagePerplexity"])
def test_the_frontier_is_what_no_cheaper_method_equals_or_beats(name: str) -> None:
    metric, draw = METRICS[name], np.random.default_rng(0)
    for _ in range(50):
        # Few different numbers, so that there are equals.
        points = [
            Outcome(f"{i}", float(draw.integers(1, 6)), float(draw.integers(1, 6)), None) for i in range(12)
        ]
        found = pareto_front(points, metric)
        expected = {
            (one.seconds, one.value)
            for one in points
            if not any(
                p.seconds <= one.seconds
                and metric.best(p.value, one.value) == p.value
                and (p.seconds, p.value) != (one.seconds, one.value)
                for p in points
            )
        }
        assert [(p.seconds, p.value) for p in found] == sorted(expected)
        assert all(p in points for p in found)


def test_the_picture_of_the_frontier_shows_every_method() -> None:
    points = [Outcome(f"method_{i}", 1.0 + i, value, 0.5) for i, value in enumerate([90.0, 92.0, 91.0] * 5)]
    metric = METRICS["MulticlassAccuracy"]
    figure = plot_pareto_front(points, metric, "test", "many", baseline="method_1")
    figure.draw_without_rendering()  # lays it out
    (axes,) = figure.axes
    line, *marks = [line for line in axes.lines if line.get_marker() not in ("_", "|")]
    assert line.get_xydata().tolist() == [[1, 90], [2, 92]] and line.get_drawstyle() == "steps-post"
    assert [mark.get_xydata().tolist() for mark in marks] == [[[p.seconds, p.value]] for p in points]
    filled = [mark.get_markerfacecolor() == mark.get_color() for mark in marks]
    assert filled == [True, True] + [False] * 13
    assert len({(mark.get_marker(), mark.get_color()) for mark in marks}) == 15
    legend = figure.legends[0]
    assert [text.get_text() for text in legend.get_texts()] == [p.method for p in points]
    assert axes.get_tightbbox().xmax <= legend.get_window_extent().xmin
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("seconds in training steps", "test accuracy, %")
    (top,) = axes.child_axes
    assert top.get_xlabel() == "in units of method_1's"
    assert top.get_xlim() == pytest.approx([x / 2 for x in axes.get_xlim()])
