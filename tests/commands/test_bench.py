"""The bench command: its mistakes, what it measures and predicts from end to end, and what it leaves."""

import contextlib
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from tests.benchmark import quick_collections
from tests.commands import bench, train
from tests.distributed.launch import finish, launches, start

SGD = ["--methods", "sgd"]  # one method loads in a fraction of the time of all
MISTAKES = [
    # arguments, and what the line on standard error must contain
    (["--ranks", "8"], ["--ranks", "--plan"]),
    (["--link", "1GB/s"], ["--link", "--plan"]),
    (["--plan", "--out", "there"], ["--out", "--plan"]),
    (["--plan", "--device", "cpu"], ["--device", "--plan"]),
    (["--device", "tpu"], ["--device", "'tpu'", "cpu", "gpu"]),
    ([*SGD, "--device", "gpu"], ["--device=gpu", "none that PyTorch finds"]),
    (["--images", "32x32"], ["--images", "'32x32'", "channels x height x width", "3x32x32"]),
    (["--images", "0x8x8"], ["--images", "'0x8x8'", "3x32x32"]),
    (
        [*SGD, "--images", "3x8x8", "model.in_channels=1"],
        ["method sgd", "model:", "does not fit the data"],
    ),
    (["--steps", "none"], ["--steps", "'none'", "whole number"]),
    ([*SGD, "--out", __file__], ["--out=", "is a file"]),
    (["sasha:optimizer.lr=1"], ["sasha:optimizer.lr=1", "'sasha'", "did you mean sassha?"]),
    (["--methods", "sassha", "sassha:optimizer.lr=one"], ["optimizer.lr", "one"]),
    ([*SGD, "precision=amp_bf16"], ["precision=amp_bf16", "needs a GPU"]),
    ([*SGD, "sgd:algorithms.sam.rho=0.1"], ["methods.sgd", "no algorithms"]),
    (
        ["--plan", "--methods", "sam,sasha"],
        ["--methods", "'sasha'", "did you mean sassha?", "there are: sgd"],
    ),
    (["--plan", "--methods", ""], ["--methods", "''", "names with commas"]),
    (["--plan", "--ranks", "0"], ["--ranks", "'0'", "from 1"]),
    (["--plan", "--ranks", "two"], ["--ranks", "'two'", "whole number"]),
    (
        [*SGD, "--plan", "--ranks", "3"],
        ["data.batch_size=128", "3 ranks", "data.batch_size=129"],
    ),
    (
        [*SGD, "--plan", "--ranks", "256"],
        ["data.batch_size=128", "256 ranks", "data.batch_size=256"],
    ),
    (["--plan", "--steps", "-1"], ["--steps"]),
    (["--plan", "--steps=0"], ["--steps", "'0'", "from 1"]),
    (["--plan", "--link", "10"], ["--link", "'10'", "number and a unit", "Gbit/s"]),
    (["--plan", "--link", "10Gb/s"], ["--link", "'10Gb/s'", "number and a unit", "Gbit/s"]),
    (["--plan", "--link", "fast"], ["--link", "'fast'", "number and a unit"]),
    (["--plan", "--link", "."], ["--link", "'.'", "number and a unit"]),
    (["--plan", "--link=-1Gbit/s"], ["--link", "'-1Gbit/s'", "number and a unit"]),
    (["--plan", "--link", "0Gbit/s"], ["--link", "'0Gbit/s'", "above 0"]),
    (["--plan", "--link", "measure"], ["--link=measure", "one process", "composer -n 2"]),
    (["--plan", "--latency", "20"], ["--latency", "'20'", "us"]),
    (["--plan", "method=sam"], ["method=sam", "--methods"]),
    (["--plan", "digit"], ["digit", "did you mean digits?"]),
    (["--plan", "digits", "sed=1"], ["sed:", "did you mean seed?"]),
    (["--plan", "digits", "data.batchsize=1"], ["data.batchsize", "did you mean data.batch_size?"]),
    (["--plan", "--method", "sam", "--rank", "1", "--foo"], ["--foo"]),
    (
        ["--plan", "--methods", "sassha", "algorithms.sam.rho=0.1"],
        ["perturbed twice", "method sassha", "keep one"],
    ),
]


@pytest.mark.parametrize(("arguments", "parts"), MISTAKES)
def test_a_mistake_is_one_line(
    arguments: list[str], parts: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.chdir(tmp_path)
    if "--device=gpu" in parts:
        monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert bench(arguments) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1
    assert all(part in err for part in parts), err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("content", "part"),
    [
        ("methods: 3", "methods: 3"),
        ("methods: {}", "empty"),
        ("name: x", "recipe"),
        ("methods: {a: 3}\nname: x", "methods.a"),
        ("- 1", "mapping"),
    ],
)
def test_a_malformed_recipe_is_one_line(
    content: str, part: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(content)
    assert bench(["--plan", str(recipe)]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and part in err.removeprefix(str(recipe)), err


def test_help_does_not_wait_for_torch() -> None:
    code = "import sys; from composer_sassha.commands import main\ntry: main(['bench', '--help'])\n"
    code += "finally: assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "--link SPEED" in done.stdout and "composer -n 2 -m composer_sassha bench" in done.stdout


def test_only_the_first_rank_speaks(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "1")
    assert bench(["--steps", "0"]) == 2
    assert capsys.readouterr() == ("", "")


def test_ranks_that_are_started_and_asked_for_must_agree(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert bench(["--plan", "--ranks", "8"]) == 2
    assert "--ranks=8: 2 processes are started" in capsys.readouterr().err
    assert bench(["--plan", "--latency", "1us"]) == 2
    assert "--latency: is measured" in capsys.readouterr().err


@pytest.fixture(scope="module")
def measured(tmp_path_factory) -> tuple[str, Path]:
    """What the command prints about SASSHA on a very small network, and where it writes."""
    out = tmp_path_factory.mktemp("measured") / "here"
    arguments = ["--methods", "sassha", "--steps", "2", "--images", "1x8x8", "--device", "cpu"]
    arguments += ["sassha:algorithms.sassha.hessian_interval=5", "model.width=2", "data.batch_size=8"]
    with quick_collections(), contextlib.redirect_stdout(io.StringIO()) as printed:
        assert bench([*arguments, "--out", str(out)]) == 0
    return printed.getvalue(), out


def test_the_measurement_prints_a_table_and_warnings(measured: tuple[str, Path]) -> None:
    out, folder = measured
    lines = out.splitlines()
    assert re.match(r"digits, batch size 8, fp32, cpu \(.*\), [\d,]+ parameters, 1 threads", lines[0])
    assert re.split(r"\s{2,}", lines[1])[:4] == ["method", "ms/step", "/ SGD", "/ floor"]
    assert [line.split()[0] for line in lines[2:5]] == ["sgd", "adamw", "sassha"]
    assert "in processor time" in out  # one thread
    assert any(line.startswith("warning: sassha: ") and "--steps" in line for line in lines)  # two rounds
    assert lines[-1] == f"written: {folder / 'bench.json'}, {folder / 'bench.png'}"


def test_the_measurement_leaves_its_numbers_and_a_chart(measured: tuple[str, Path]) -> None:
    _, folder = measured
    assert sorted(path.name for path in folder.iterdir()) == ["bench.json", "bench.png"]
    results = json.loads((folder / "bench.json").read_text())
    assert results["rounds"] == 2 and results["clock"] == "processor" and results["batch_size"] == 8
    methods = results["methods"]
    assert [*methods] == ["sgd", "adamw", "sassha"]
    sassha = methods["sassha"]
    assert [(kind["kind"], kind["share"]) for kind in sassha["kinds"]] == [
        ("perturbs and refreshes", 0.2),
        ("perturbs", 0.8),
    ]
    for found in (sassha["milliseconds"], sassha["over_sgd"], sassha["over_floor"], sassha["floor_over_raw"]):
        assert (
            0 < found["low"] <= found["median"] <= found["high"] and found["number"] == 2 and found["vague"]
        )
    for method in ("sgd", "adamw"):
        assert methods[method]["over_floor"] is None and methods[method]["memory"]["refresh"] is None
    assert (
        methods["adamw"]["update_over_adamw"]["median"] == 1 and methods["adamw"]["copies_beyond_adamw"] == 0
    )
    assert methods["sgd"]["over_sgd"]["median"] == 1
    assert sassha["memory"]["refresh"] > sassha["memory"]["ordinary"] > methods["adamw"]["memory"]["ordinary"]
    assert sassha["launches"] is None  # of a GPU
    with Image.open(folder / "bench.png") as chart:
        assert chart.format == "PNG" and chart.width > 1000


def test_several_processes_are_not_measured(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert bench(["digits"]) == 2
    assert "2 processes are started" in capsys.readouterr().err


def rows(text: str) -> dict[str, list[float]]:
    """The table's numbers by method."""
    lines = text.splitlines()
    end = next(i for i, line in enumerate(lines) if line.startswith("alone:"))
    table = [re.split(r"\s{2,}", line) for line in lines[2:end]]
    return {name: [float(cell.rstrip("%")) for cell in cells] for name, *cells in table}


def test_a_plan_of_the_digits(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = ["--plan", "digits", "--methods", "sam,sassha,msassha,gsam,looksam", "--ranks", "4"]
    assert bench([*arguments, "--steps", "2", "--link", "1GB/s", "--latency", "0s", "model.width=8"]) == 0
    out, err = capsys.readouterr()
    assert err == "" and not list(tmp_path.iterdir())
    assert out.startswith("digits on 4 ranks of 32 samples each, link 8 Gbit/s, latency 0 us; ")
    found = rows(out)
    assert [*found] == ["sgd", "sam", "gsam", "looksam", "sassha", "msassha"]
    megabytes = {method: cells[1] for method, cells in found.items()}
    assert megabytes["sgd"] == megabytes["sam"]
    assert megabytes["sassha"] == megabytes["msassha"] == pytest.approx(1.1 * megabytes["sgd"], rel=0.02)
    collectives = {method: cells[2] for method, cells in found.items()}
    assert collectives["sam"] == collectives["gsam"] == collectives["sgd"] + 1
    assert collectives["looksam"] == pytest.approx(collectives["sgd"] + 0.2)
    for alone, _, _, communication, waiting, step, ratio in found.values():
        assert communication == waiting and step == pytest.approx(alone + waiting, abs=0.011)
        assert ratio == pytest.approx(step / found["sgd"][5], abs=0.011)


def test_a_plan_of_one_run(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch) -> None:
    """The config.yaml of a run is a recipe with one method, which is then what it is compared with."""
    monkeypatch.chdir(tmp_path)
    assert train(["digits", "method=sam", "max_duration=1ba", "progress_bar=false"]) == 0
    capsys.readouterr()
    config = "runs/digits/sam/seed0/config.yaml"
    assert bench(["--plan", config, "--steps", "1", "--ranks", "1"]) == 0
    out, _ = capsys.readouterr()
    (cells,) = rows(out).values()
    assert "/ sam" in out and cells[1:5] == [0, 0, 0, 0] and cells[6] == 1


def plan_in(folder: Path) -> None:
    os.chdir(folder)
    arguments = ["--plan", "--methods", "sassha", "--steps", "1", "model.width=2", "data.batch_size=8"]
    with Path(f"../said{os.environ['RANK']}").open("w") as said, contextlib.redirect_stdout(said):
        sys.exit(bench(arguments))


@launches
def test_two_ranks_print_what_is_predicted_and_measured(tmp_path: Path) -> None:
    folder = tmp_path / "here"
    folder.mkdir()
    log = tmp_path / "log"
    assert finish(start(2, log, plan_in, folder, meet=False)), log.read_text()
    said, other_said = ((tmp_path / f"said{rank}").read_text() for rank in range(2))
    assert other_said == ""
    out = said[: said.index("Left out")]
    assert out.startswith("digits on 2 ranks of 4 samples each, link ")
    assert out.splitlines()[1].split()[-3:] == ["/", "sgd", "off"]
    found = rows(out)
    assert [*found] == ["sgd", "sassha"]
    for *_, ratio, measured, true, off in found.values():
        # Both ratios are printed to within half a hundredth, and the percentage to half of one.
        rounded = 0.5 + 100 * (ratio + 0.005) / (true - 0.005) - 100 * ratio / true
        assert measured > 0 and off == pytest.approx(100 * (ratio / true - 1), abs=rounded)
    assert found["sgd"][6:9:2] == [1, 1] and not list(folder.iterdir())
