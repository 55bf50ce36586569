"""The inspection of finished runs: what it measures, what it draws, and what it refuses."""

import json
import os
import shutil
import subprocess
import sys
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from matplotlib.axes import Axes
from PIL import Image
from scipy.stats import ttest_ind

from composer_sassha.inspection import finished, pictures, record, runner, section
from composer_sassha.recipes.config import load_recipe
from composer_sassha.recipes.data.digits import Digits
from composer_sassha.sharpness import (
    Measures,
    filter_normalized,
    line,
    measure,
    objective_of,
    spectrum,
    top_eigenpairs,
    undisturbed,
)
from tests.commands import SMALL, compare, inspect, train, undraw

QUICK = ["--samples", "40", "--steps", "3", "--probes", "1", "--trace-samples", "2", "--points", "5"]
RECIPE = [*SMALL, "max_duration=1ep"]
LINES = ("random", "eigenvector", "interpolation")
PICTURES = {"spectra.png", "lines.png", "planes.png"}


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A comparison of two methods, one of them with two seeds."""
    folder = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        undraw(patch)
        for method, seed in (("sgd", 0), ("sgd", 1), ("sam", 0)):
            out = [f"method={method}", f"seed={seed}", f"save_folder={folder / 'runs'}"]
            assert train(["digits", *RECIPE, *out]) == 0
    return folder


@pytest.fixture
def folder(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copytree(trained / "runs", tmp_path / "runs", symlinks=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def measured(trained: Path, tmp_path_factory) -> Path:
    """The same, with one run measured."""
    folder = tmp_path_factory.mktemp("measured")
    shutil.copytree(trained / "runs", folder / "runs", symlinks=True)
    with pytest.MonkeyPatch.context() as patch:
        undraw(patch)
        patch.chdir(folder)
        assert inspect(["runs/digits/sgd/seed0", *QUICK]) == 0
    return folder


@pytest.fixture
def folder_measured(measured: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copytree(measured / "runs", tmp_path / "runs", symlinks=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def files(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


def refused(argv: list[str], folder: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """The one line that the command says when it refuses, having written nothing."""
    capsys.readouterr()
    before = files(folder)
    assert inspect(argv) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.endswith("\n") and err.count("\n") == 1
    assert files(folder) == before
    return err


def found(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "runs/digits/sharpness.json").read_text())


def model_of(run: str) -> Any:
    model = load_recipe(Path(run, "config.yaml")).model.build()
    model.load_state_dict(
        torch.load(Path(run, "checkpoints/latest-rank0.pt"), weights_only=False)["state"]["model"]
    )
    return model


def heldout(count: int) -> tuple[torch.Tensor, ...]:
    _, data = Digits().splits()
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(0))
    return data[order[:count]]


def test_runs_are_measured_and_reported(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = ["runs/digits/sgd/seed0", "runs/digits/sgd/seed1", "runs/digits/sam/seed0"]
    options = [*QUICK, "--rho", "0.1", "--asam-rho", "0.3"]
    with pytest.MonkeyPatch.context() as patch:
        undraw(patch)
        assert inspect([*runs[:2], *options]) == 0
    before = found(folder)
    assert inspect([*runs, *options]) == 0
    out = capsys.readouterr().out
    after = found(folder)
    assert list(after["runs"]) == ["sgd/seed0", "sgd/seed1", "sam/seed0"]
    assert {name: after["runs"][name] for name in before["runs"]} == before["runs"]
    assert out.count("sgd/seed0: ") == 1, "what is measured is left alone"

    # The numbers are those of the library, at the checkpoint's weights, on the same samples.
    x, y = heldout(40)
    entry = after["runs"]["sgd/seed1"]
    model = model_of(runs[1])
    with undisturbed(model):
        objective = objective_of(model, [((x, y), 40)])
        exact = measure(objective, Measures(eigenvalues=0, trace_samples=2, rho=0.1, asam_rho=0.3))
        pairs = top_eigenpairs(objective)
        density = spectrum(objective, 3, 1)
        along = {
            "random": line(objective, filter_normalized(objective, 0), [-1.0, 1.0]),
            "eigenvector": line(objective, torch.tensor(pairs.vectors[0]).float(), [-0.5, 0.5]),
        }
    assert {"sam", "asam", "m16", "trace", "average", "loss"} < exact.keys() < entry["numbers"].keys()
    for name, value in exact.items():
        assert entry["numbers"][name] == pytest.approx(value, rel=1e-4, abs=1e-7), name
    assert entry["numbers"]["lambda_max"] == pytest.approx(pairs.values[0], rel=1e-3)

    # Lines and planes have the loss itself in their middle, and the interpolation both ends.
    for name in ("random", "eigenvector"):
        assert len(entry["lines"][name]) == 5
        assert entry["lines"][name][2] == pytest.approx(exact["loss"], rel=1e-5)
        assert sorted(entry["lines"][name][::4]) == pytest.approx(sorted(along[name]), rel=1e-3), name
    plane = np.array(entry["plane"])
    assert plane.shape == (3, 3) and plane[1, 1] == pytest.approx(exact["loss"], rel=1e-5)
    assert plane[1] == pytest.approx(entry["lines"]["random"][::2], rel=1e-5)
    assert plane[:, 1] != pytest.approx(plane[1], rel=1e-3), "two directions"
    ends = [entry["lines"]["interpolation"][i] for i in (0, -1)]
    reference = after["runs"][after["reference"]]
    assert after["reference"] == "sgd/seed0"
    assert ends == pytest.approx([exact["loss"], reference["numbers"]["loss"]], rel=1e-5)
    eigenvalues, weights = entry["spectrum"]
    assert len(eigenvalues) == 3 and sum(weights) == pytest.approx(1, abs=1e-5)
    assert eigenvalues == pytest.approx(density.eigenvalues, rel=1e-3, abs=1e-4)

    # The table and the report.
    home = folder / "runs/digits"
    html = (home / "report.html").read_text()
    assert html.count("<h2>Sharpness</h2>") == 1 and html.count("data:image/png") == 4
    mean = np.mean([after["runs"][f"sgd/seed{k}"]["numbers"]["trace"] for k in (0, 1)])
    row = next(line for line in out.splitlines() if line.startswith("| sgd "))
    shown = dict(zip(head(out), [cell.strip() for cell in row.split("|")[1:-1]], strict=True))
    assert shown["seeds"] == "2" and float(shown["trace"].split()[0]) == pytest.approx(mean, rel=5e-3)
    assert "λ₁ of sam: " in html and "| sam " in out
    assert {path.name for path in home.glob("*.png")} == PICTURES | {"curves.png"}
    for path in home.glob("*.png"):
        with Image.open(path) as picture:
            assert (picture.format == "PNG" and picture.width > 1000) or path.name == "curves.png", path
    assert not list(home.rglob("*.partial"))

    # A comparison that writes its report again keeps the section.
    command = ["digits", "--methods", "sgd", "--seeds", "0,1", *RECIPE]
    undraw(monkeypatch)
    assert compare(command) == 0
    html = (home / "report.html").read_text()
    assert html.count("<h2>Sharpness</h2>") == 1 and "composer_sassha compare" in html


def head(out: str) -> list[str]:
    line = next(line for line in out.splitlines() if line.startswith("| method "))
    return [cell.strip() for cell in line.split("|")[1:-1]]


@pytest.mark.usefixtures("undrawn")
def test_the_section_is_put_into_a_report_that_is_there(folder: Path) -> None:
    command = ["digits", "--methods", "sgd,sam", "--seeds", "0", *RECIPE]
    assert compare(command) == 0
    report = folder / "runs/digits/report.html"
    before = report.read_text()
    assert "<h2>Sharpness</h2>" not in before
    assert inspect(["runs/digits/sgd/seed0", *QUICK]) == 0
    after = report.read_text()
    assert after.count("<h2>Sharpness</h2>") == 1 and "--methods sgd,sam" in after
    assert after.index("<h2>Sharpness</h2>") < after.index("<h2>Settings</h2>")
    begin, end = after.index("<!-- sharpness -->"), after.index("<!-- /sharpness -->")
    assert after[:begin] + "<!-- sharpness -->" + after[end:] == before


@pytest.mark.usefixtures("undrawn")
def test_the_training_split_is_another_one_and_stays_the_same(folder: Path, measured: Path) -> None:
    assert inspect(["runs/digits/sgd/seed0", *QUICK, "--split", "train"]) == 0
    path = folder / "runs/digits/sharpness.json"
    first = path.read_text()
    losses = json.loads(first)["runs"]["sgd/seed0"]["numbers"]["loss"]
    path.unlink()
    assert inspect(["runs/digits/sgd/seed0", *QUICK, "--split", "train"]) == 0
    assert path.read_text() == first, "the same samples, augmented in the same way"
    assert found(measured)["runs"]["sgd/seed0"]["numbers"]["loss"] != losses


@pytest.mark.usefixtures("undrawn")
def test_a_run_that_was_trained_again_is_measured_again(folder_measured: Path) -> None:
    before = found(folder_measured)["runs"]["sgd/seed0"]
    own, other = (next(Path(f"runs/digits/sgd/seed{k}/checkpoints").glob("ep*")) for k in (0, 1))
    shutil.copy(other, own)
    assert inspect(["runs/digits/sgd/seed0", *QUICK]) == 0
    after = found(folder_measured)["runs"]["sgd/seed0"]
    assert after["numbers"]["loss"] != before["numbers"]["loss"]


def test_the_newest_checkpoint_is_measured_without_its_link(folder: Path) -> None:
    checkpoints = Path("runs/digits/sgd/seed0/checkpoints")
    (newest,) = checkpoints.glob("ep*")
    (checkpoints / "latest-rank0.pt").unlink()
    for name, age in (("ep0-ba5-rank0.pt", 60), ("ep0-ba9-rank0.pt", 30)):
        older = shutil.copy(newest, checkpoints / name)
        os.utime(older, (newest.stat().st_mtime - age,) * 2)
    assert finished.find_run(Path("runs/digits/sgd/seed0")).checkpoint == newest.resolve()


def test_what_is_not_finite_is_nothing_in_json() -> None:
    tree = {"a": [1.0, float("inf"), -float("inf")], "b": float("nan"), "c": 3, "d": "x"}
    assert record.without_nonfinite(tree) == {"a": [1.0, None, None], "b": None, "c": 3, "d": "x"}


@pytest.mark.usefixtures("undrawn")
def test_a_diverged_run_has_no_numbers_and_stops_nothing(folder_measured: Path, capsys) -> None:
    (path,) = Path("runs/digits/sam/seed0/checkpoints").glob("ep*")
    checkpoint = torch.load(path, weights_only=False)
    for tensor in checkpoint["state"]["model"].values():
        if tensor.is_floating_point():
            tensor.fill_(torch.nan)
    torch.save(checkpoint, path)
    assert inspect(["runs/digits/sgd/seed0", "runs/digits/sam/seed0", *QUICK]) == 0
    entry = found(folder_measured)["runs"]["sam/seed0"]
    assert entry["spectrum"] is None and entry["numbers"]["loss"] is None and "sam" not in entry["numbers"]
    out = capsys.readouterr().out
    row = next(line for line in out.splitlines() if line.startswith("| sam "))
    assert row.count(" - ") >= 8


def test_what_is_not_a_finished_run_is_one_line(folder: Path, capsys) -> None:
    run = Path("runs/digits/sgd/seed0")
    assert "there is no such folder" in refused(["runs/none", *QUICK], folder, capsys)
    assert "not the folder of a run" in refused(["runs/digits", *QUICK], folder, capsys)
    assert "RUN: not given" in refused(QUICK, folder, capsys)
    assert "only settings of the data" in refused([str(run), "model.width=3", *QUICK], folder, capsys)
    assert "data.rot: unknown key" in refused([str(run), "data.rot=3", *QUICK], folder, capsys)

    results = run / "results.json"
    text = results.read_text()
    results.write_text("{")
    assert "results.json: is damaged" in refused([str(run), *QUICK], folder, capsys)
    results.unlink()
    message = refused(["runs/digits/sam/seed0", str(run), *QUICK], folder, capsys)
    assert "is not finished" in message and "composer_sassha train runs/digits/sgd/seed0" in message
    results.write_text(text)

    config = run / "config.yaml"
    settings = config.read_text()
    config.write_text("llm: gpt\n")
    assert "cannot be read" in refused([str(run), *QUICK], folder, capsys)
    config.write_text(settings.replace("width: 2", "width: 3"))
    message = refused_later([str(run), *QUICK], capsys)
    assert "does not fit the model" in message
    config.write_text(settings)

    (checkpoint,) = (run / "checkpoints").glob("ep*")
    whole = checkpoint.read_bytes()
    checkpoint.write_bytes(whole[:1000])
    assert "no checkpoint that can be read" in refused([str(run), *QUICK], folder, capsys)
    torch.save({"weights": 1}, checkpoint)
    assert "cannot be loaded" in refused_later([str(run), *QUICK], capsys)
    shutil.rmtree(run / "checkpoints")
    assert "no checkpoint that can be read" in refused([str(run), *QUICK], folder, capsys)
    assert not (folder / "runs/digits/sharpness.json").exists()


def refused_later(argv: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line of a mistake that shows once the run is being measured."""
    capsys.readouterr()
    assert inspect(argv) == 2
    _, err = capsys.readouterr()
    assert err.count("\n") == 1
    return err


def test_a_missing_data_set_is_one_line(folder: Path, capsys) -> None:
    run = Path("runs/digits/sgd/seed0")
    config = run / "config.yaml"
    recipe = load_recipe("cifar10_resnet20", ["method=sgd", "data.root=nowhere"])
    config.write_text(yaml.safe_dump(recipe.settings()))
    message = refused_later([str(run), *QUICK], capsys)
    assert "root=nowhere" in message and "data.download=true" in message
    assert "root=there" in refused_later([str(run), "data.root=there", *QUICK], capsys)
    assert not (folder / "runs/digits/sharpness.json").exists()


def test_what_was_measured_otherwise_is_not_mixed(folder_measured: Path, capsys) -> None:
    folder = folder_measured
    message = refused(["runs/digits/sam/seed0", *QUICK, "--samples", "50"], folder, capsys)
    assert "another samples (40 there, 50 here)" in message
    path = folder / "runs/digits/sharpness.json"
    path.write_text("[]")
    assert "sharpness.json: is damaged" in refused(["runs/digits/sgd/seed0", *QUICK], folder, capsys)
    shutil.copytree("runs/digits", "runs/other")
    two = ["runs/digits/sgd/seed0", "runs/other/sgd/seed0"]
    assert "two comparisons" in refused([*two, *QUICK], folder, capsys)


@pytest.mark.parametrize(
    ("option", "value"),
    [("--samples", "0"), ("--points", "1"), ("--rho", "-1"), ("--asam-rho", "x"), ("--split", "valid")],
)
def test_options_that_are_not_allowed(option, value, folder: Path, capsys) -> None:
    message = refused(["runs/digits/sgd/seed0", f"{option}={value}"], folder, capsys)
    assert option in message and value in message


def test_a_launcher_is_refused(folder: Path, capsys, monkeypatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "without a launcher" in refused(["runs/digits/sgd/seed0"], folder, capsys)


def test_what_was_measured_before_an_interrupt_is_kept(folder: Path, capsys, monkeypatch) -> None:
    def measured(run, *others):
        if str(run) == "sam/seed0":
            raise KeyboardInterrupt
        return {"version": run.version}

    monkeypatch.setattr(runner, "measure_run", measured)
    assert inspect(["runs/digits/sgd/seed0", "runs/digits/sam/seed0", *QUICK]) == 130
    assert "interrupted" in capsys.readouterr().err
    assert list(found(folder)["runs"]) == ["sgd/seed0"]


def test_help_comes_without_importing_torch() -> None:
    code = "import sys; from composer_sassha.commands import main\ntry: main(['inspect', '--help'])\n"
    code += "finally: assert 'torch' not in sys.modules"
    root = str(Path(__file__).parents[2])
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root)
    assert done.returncode == 0, done.stderr
    assert "--split" in done.stdout


def pretend(methods: int, seeds: int = 2) -> dict[str, Any]:
    """What inspecting many methods leaves, made up."""
    draws = np.random.default_rng(0)
    runs = {}
    for method, seed in product(("sgd", "adamw", "sam", "asam")[:methods], range(seeds)):
        scale = float(draws.uniform(1, 30))
        grid = np.linspace(-1, 1, 5)
        runs[f"{method}/seed{seed}"] = {
            "method": method,
            "seed": seed,
            "score": 0.9,
            "numbers": {"lambda_max": scale, "trace": 3 * scale},
            "spectrum": [[0.0, 1.0, scale], [0.9, 0.09, 0.01]],
            "lines": {name: (0.1 + scale * grid**2).tolist() for name in LINES},
            "plane": (0.1 + scale * (grid[:, None] ** 2 + grid**2)).tolist(),
        }
    options = {"split": "heldout", "samples": 1, "rho": 0.05, "asam_rho": 0.5, "points": 5}
    about = {"heldout": "test", "metric": "MulticlassAccuracy", "baseline": "sgd", "reference": "sgd/seed0"}
    return {"options": options, **about, "runs": runs}


@pytest.mark.parametrize("methods", [1, 4])
def test_panels_share_their_scale(methods: int) -> None:
    given = pretend(methods)
    for figure, count in ((pictures.plot_spectra(given), methods), (pictures.plot_planes(given), methods)):
        panels = [axes for axes in figure.axes if axes.get_title()]
        assert [axes.get_title() for axes in panels] == list(record.by_method(given))[:count]
        assert len({axes.get_xlim() for axes in panels}) == len({axes.get_ylim() for axes in panels}) == 1
    lines = pictures.plot_lines(given)
    assert len({axes.get_ylim() for axes in lines.axes}) == 1
    # On the way to the first run, its own method is there with another seed.
    assert [len(axes.lines) for axes in lines.axes] == [methods] * 3


def test_largest_eigenvalues_are_compared_by_geometric_means() -> None:
    given = pretend(2)
    values = {"sgd": [1.0, 4.0], "adamw": [18.0, 8.0]}
    for run in given["runs"].values():
        run["numbers"]["lambda_max"] = values[run["method"]][run["seed"]]
    (line,) = section.eigenvalue_notes(given)
    p = ttest_ind(np.log(values["adamw"]), np.log(values["sgd"]), equal_var=False).pvalue
    assert line.startswith("λ₁ of adamw: 6.00 times sgd's") and f"p = {p:.2g})" in line
    table = section.sharpness_table(given)
    assert [row[:2] for row in table.rows] == [["sgd", "2"], ["adamw", "2"]]
    assert table.rows[0][table.head.index("λ₁")] == "2.50 ± 2.12"
    assert table.rows[0][table.head.index("test accuracy, %")].startswith("90.00")
    given["runs"] = dict(reversed(given["runs"].items()))
    assert [run["seed"] for run in record.by_method(given)["sgd"]] == [0, 1]


def test_lines_are_drawn_where_they_were_measured() -> None:
    """Of the first seed; on the way to the first run, its own method is there with the second."""
    given = pretend(2)
    figure = pictures.plot_lines(given)
    for axes, name, at in zip(
        figure.axes,
        ("random", "eigenvector", "interpolation"),
        (np.linspace(-1, 1, 5), np.linspace(-0.5, 0.5, 5), np.linspace(0, 1, 5)),
        strict=True,
    ):
        seeds = {"sgd": 1 if name == "interpolation" else 0, "adamw": 0}
        assert [drawn.get_label() for drawn in axes.lines] == list(seeds)
        for drawn, (method, seed) in zip(axes.lines, seeds.items(), strict=True):
            assert drawn.get_xdata() == pytest.approx(at)
            assert drawn.get_ydata() == pytest.approx(given["runs"][f"{method}/seed{seed}"]["lines"][name])


def test_densities_are_drawn_whole() -> None:
    """One point, of weight 1, in the first panel, which is higher than the others."""
    given = pretend(2, seeds=1)
    given["runs"]["sgd/seed0"]["spectrum"] = [[4.0], [1.0]]
    given["runs"]["adamw/seed0"]["spectrum"] = [[0.0, 4.0], [0.7, 0.3]]
    width = 4.0 / 200
    first, second = pictures.plot_spectra(given).axes
    x, y = first.lines[0].get_data()
    assert y.max() == pytest.approx(1 / (width * (2 * np.pi) ** 0.5), rel=1e-2)
    assert x[y.argmax()] == pytest.approx(4.0, abs=width / 4) and x.min() <= -4 * width
    other = second.lines[0].get_ydata()
    assert other.max() == pytest.approx(0.7 * y.max(), rel=1e-2)
    assert first.get_ylim()[1] > y.max() and first.get_ylim()[0] > 0


def test_planes_are_drawn_as_they_were_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    given = pretend(2)
    grid = np.linspace(-1, 1, 5)
    for run in given["runs"].values():
        run["plane"] = (np.array(run["plane"]) * (2 + grid) * (1 + run["seed"])).tolist()
    drawn = []
    plain = Axes.contourf
    monkeypatch.setattr(Axes, "contourf", lambda *a, **k: drawn.append((a, k)) or plain(*a, **k))
    pictures.plot_planes(given)
    for (arguments, settings), method in zip(drawn, ("sgd", "adamw"), strict=True):
        _, x, y, values = arguments
        assert x == pytest.approx(grid) and y == pytest.approx(grid)
        assert values == pytest.approx(np.array(given["runs"][f"{method}/seed0"]["plane"]))
        levels = settings["levels"]
        everything = np.array([given["runs"][f"{m}/seed0"]["plane"] for m in ("sgd", "adamw")])
        assert levels[0] <= everything.min() and everything.max() <= levels[-1] and levels == sorted(levels)
