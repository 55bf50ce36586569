"""The inspection of finished runs: what it measures, what it draws, and what it refuses."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from composer_sassha import compare, inspect, train
from composer_sassha.comparison import inspection, sharpness
from composer_sassha.comparison.grid import load_grid
from composer_sassha.recipes.config import load_recipe
from composer_sassha.recipes.data.digits import Digits
from composer_sassha.sharpness import Measures, measure, objective_of, top_eigenvalues, undisturbed

QUICK = ["--samples", "40", "--steps", "3", "--probes", "1", "--trace-samples", "2", "--points", "5"]
RECIPE = ["max_duration=1ep", "model.width=2", "progress_bar=false"]
LINES = ("random", "eigenvector", "interpolation")
PICTURES = {"spectra.png", "lines.png", "planes.png"}


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A comparison of two methods, one of them with two seeds."""
    folder = tmp_path_factory.mktemp("trained")
    for method, seed in (("sgd", 0), ("sgd", 1), ("sam", 0)):
        out = [f"method={method}", f"seed={seed}", f"save_folder={folder / 'runs'}"]
        assert train.main(["digits", *RECIPE, *out]) == 0
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
        patch.chdir(folder)
        assert inspect.main(["runs/digits/sgd/seed0", *QUICK]) == 0
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
    assert inspect.main(argv) == 2
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


def test_runs_are_measured_and_reported(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = ["runs/digits/sgd/seed0", "runs/digits/sgd/seed1", "runs/digits/sam/seed0"]
    assert inspect.main([*runs[:2], *QUICK]) == 0
    before = found(folder)
    assert inspect.main([*runs, *QUICK]) == 0
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
        exact = measure(objective, Measures(eigenvalues=0, trace_samples=2))
        largest = top_eigenvalues(objective)
    assert {"sam", "asam", "m16", "trace", "average", "loss"} < exact.keys() < entry["numbers"].keys()
    for name, value in exact.items():
        assert entry["numbers"][name] == pytest.approx(value, rel=1e-4, abs=1e-7), name
    assert entry["numbers"]["lambda_max"] == pytest.approx(largest[0], rel=1e-3)

    # Lines and planes have the loss itself in their middle, and the interpolation both ends.
    for name in ("random", "eigenvector"):
        assert len(entry["lines"][name]) == 5
        assert entry["lines"][name][2] == pytest.approx(exact["loss"], rel=1e-5)
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
    assert not list(home.rglob("*.partial"))

    # A comparison that writes its report again keeps the section.
    command = ["digits", "--methods", "sgd", "--seeds", "0,1", *RECIPE]
    assert compare.main(command) == 0
    html = (home / "report.html").read_text()
    assert html.count("<h2>Sharpness</h2>") == 1 and "composer_sassha.compare" in html


def head(out: str) -> list[str]:
    line = next(line for line in out.splitlines() if line.startswith("| method "))
    return [cell.strip() for cell in line.split("|")[1:-1]]


def test_the_section_is_put_into_a_report_that_is_there(folder: Path) -> None:
    command = ["digits", "--methods", "sgd,sam", "--seeds", "0", *RECIPE]
    assert compare.main(command) == 0
    report = folder / "runs/digits/report.html"
    before = report.read_text()
    assert "<h2>Sharpness</h2>" not in before
    assert inspect.main(["runs/digits/sgd/seed0", *QUICK]) == 0
    after = report.read_text()
    assert after.count("<h2>Sharpness</h2>") == 1 and "--methods sgd,sam" in after
    assert after.index("<h2>Sharpness</h2>") < after.index("<h2>Settings</h2>")
    begin, end = after.index("<!-- sharpness -->"), after.index("<!-- /sharpness -->")
    assert after[:begin] + "<!-- sharpness -->" + after[end:] == before


def test_the_training_split_is_another_one_and_stays_the_same(folder: Path, measured: Path) -> None:
    assert inspect.main(["runs/digits/sgd/seed0", *QUICK, "--split", "train"]) == 0
    path = folder / "runs/digits/sharpness.json"
    first = path.read_text()
    losses = json.loads(first)["runs"]["sgd/seed0"]["numbers"]["loss"]
    path.unlink()
    assert inspect.main(["runs/digits/sgd/seed0", *QUICK, "--split", "train"]) == 0
    assert path.read_text() == first, "the same samples, augmented in the same way"
    assert found(measured)["runs"]["sgd/seed0"]["numbers"]["loss"] != losses


def test_a_run_that_was_trained_again_is_measured_again(folder_measured: Path) -> None:
    before = found(folder_measured)["runs"]["sgd/seed0"]
    own, other = (next(Path(f"runs/digits/sgd/seed{k}/checkpoints").glob("ep*")) for k in (0, 1))
    shutil.copy(other, own)
    assert inspect.main(["runs/digits/sgd/seed0", *QUICK]) == 0
    after = found(folder_measured)["runs"]["sgd/seed0"]
    assert after["numbers"]["loss"] != before["numbers"]["loss"]


def test_a_diverged_run_has_no_numbers_and_stops_nothing(folder: Path, capsys) -> None:
    (path,) = Path("runs/digits/sam/seed0/checkpoints").glob("ep*")
    checkpoint = torch.load(path, weights_only=False)
    for tensor in checkpoint["state"]["model"].values():
        if tensor.is_floating_point():
            tensor.fill_(torch.nan)
    torch.save(checkpoint, path)
    assert inspect.main(["runs/digits/sgd/seed0", "runs/digits/sam/seed0", *QUICK]) == 0
    entry = found(folder)["runs"]["sam/seed0"]
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
    assert "is not finished" in message and "composer_sassha.train runs/digits/sgd/seed0" in message
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
    assert inspect.main(argv) == 2
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
    plain = inspection._measured

    def measured(run, *others):
        if str(run) == "sam/seed0":
            raise KeyboardInterrupt
        return plain(run, *others)

    monkeypatch.setattr(inspection, "_measured", measured)
    assert inspect.main(["runs/digits/sgd/seed0", "runs/digits/sam/seed0", *QUICK]) == 130
    assert "interrupted" in capsys.readouterr().err
    assert list(found(folder)["runs"]) == ["sgd/seed0"]


def test_help_comes_without_importing_torch() -> None:
    code = "import sys; from composer_sassha.inspect import main\ntry: main(['--help'])\n"
    code += "finally: assert 'torch' not in sys.modules"
    root = str(Path(__file__).parents[1])
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root)
    assert done.returncode == 0, done.stderr
    assert "--split" in done.stdout


def pretend(methods: int, seeds: int = 2) -> dict[str, Any]:
    """What inspecting many methods leaves, made up."""
    draws = np.random.default_rng(0)
    runs = {}
    for recipe in load_grid("digits", [], range(seeds))[: methods * seeds]:
        scale = float(draws.uniform(1, 30))
        grid = np.linspace(-1, 1, 5)
        runs[f"{recipe.method}/seed{recipe.seed}"] = {
            "method": recipe.method,
            "seed": recipe.seed,
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
    for figure, count in ((sharpness.spectra(given), methods), (sharpness.planes(given), methods)):
        panels = [axes for axes in figure.axes if axes.get_title()]
        assert [axes.get_title() for axes in panels] == list(sharpness.by_method(given))[:count]
        assert len({axes.get_xlim() for axes in panels}) == len({axes.get_ylim() for axes in panels}) == 1
    lines = sharpness.lines(given)
    assert len({axes.get_ylim() for axes in lines.axes}) == 1
    # On the way to the first run, its own method is there with another seed.
    assert [len(axes.lines) for axes in lines.axes] == [methods] * 3


def test_the_largest_eigenvalues_are_compared_by_their_geometric_means() -> None:
    given = pretend(2)
    values = {"sgd": [1.0, 4.0], "adamw": [20.0, 5.0]}
    for run in given["runs"].values():
        run["numbers"]["lambda_max"] = values[run["method"]][run["seed"]]
    (line,) = sharpness.notes(given)
    assert line.startswith("λ₁ of adamw: 5.00 times sgd's") and "p = " in line
    table = sharpness.table(given)
    assert [row[:2] for row in table.rows] == [["sgd", "2"], ["adamw", "2"]]
    assert table.rows[0][table.head.index("λ₁")] == "2.50 ± 2.12"
