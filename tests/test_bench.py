"""The bench command: its mistakes, the equations of its predictions, and a plan from end to end."""

import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from composer.models import ComposerClassifier
from torch import nn

from composer_sassha import GSAM, MSAM, SAM, LazyHessian, LookSAM, MSassha, Sassha
from composer_sassha.bench import (
    Collective,
    Kind,
    Link,
    Stopwatch,
    Timing,
    exposed,
    main,
    predict,
    schedule,
    traffic,
)
from composer_sassha.train import main as train
from tests.helpers import network, trainer
from tests.methods import sassha, sgd

MISTAKES = [
    # arguments, and what the line on standard error must contain
    ([], ["nothing to do", "--plan"]),
    (
        ["--plan", "--methods", "sam,sasha"],
        ["--methods", "'sasha'", "did you mean sassha?", "there are: sgd"],
    ),
    (["--plan", "--methods", ""], ["--methods", "''", "there are: sgd"]),
    (["--plan", "--ranks", "0"], ["--ranks=0", "at least 1"]),
    (["--plan", "--ranks", "two"], ["--ranks=two", "whole number"]),
    (["--plan", "--ranks", "3"], ["data.batch_size=128", "3 ranks", "data.batch_size=129"]),
    (["--plan", "--ranks", "256"], ["data.batch_size=128", "256 ranks", "data.batch_size=256"]),
    (["--plan", "--steps", "-1"], ["--steps"]),
    (["--plan", "--steps=0"], ["--steps=0", "at least 1"]),
    (["--plan", "--link", "10"], ["--link=10", "number and a unit", "Gbit/s"]),
    (["--plan", "--link", "10Gb/s"], ["--link=10Gb/s", "number and a unit", "Gbit/s"]),
    (["--plan", "--link", "fast"], ["--link=fast", "number and a unit"]),
    (["--plan", "--link", "."], ["--link=.", "number and a unit"]),
    (["--plan", "--link=-1Gbit/s"], ["--link=-1Gbit/s", "number and a unit"]),
    (["--plan", "--link", "0Gbit/s"], ["--link=0Gbit/s", "above 0"]),
    (["--plan", "--link", "measure"], ["--link=measure", "one process", "composer -n 2"]),
    (["--plan", "--latency", "20"], ["--latency=20", "us"]),
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
    arguments: list[str], parts: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1
    assert all(part in err for part in parts), err


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
    assert main(["--plan", str(recipe)]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and part in err.removeprefix(str(recipe)), err


def test_help_does_not_wait_for_torch() -> None:
    code = "import sys; from composer_sassha.bench import main\ntry: main(['--help'])\n"
    code += "finally: assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "--link SPEED" in done.stdout and "composer -n 2 -m composer_sassha.bench" in done.stdout


def test_only_the_first_rank_speaks(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "1")
    assert main([]) == 2
    assert capsys.readouterr() == ("", "")


def test_ranks_that_are_started_and_asked_for_must_agree(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["--plan", "--ranks", "8"]) == 2
    assert "--ranks=8: 2 processes are started" in capsys.readouterr().err
    assert main(["--plan", "--latency", "1us"]) == 2
    assert "--latency=1us" in capsys.readouterr().err


# The equations


def test_an_all_reduce_takes_the_shorter_of_the_two_ways() -> None:
    link = Link(bandwidth=100.0, latency=0.5)
    assert link.seconds(400, ranks=1) == 0
    assert link.seconds(400, ranks=2) == 2 * (0.5 + 2)
    assert link.seconds(400, ranks=4) == 6 * (0.5 + 1)  # around a ring: 2 * 2 * (0.5 + 4) through a tree
    assert link.seconds(4, ranks=4) == pytest.approx(4 * (0.5 + 0.04))  # 6 * (0.5 + 0.01) around a ring


@pytest.mark.parametrize(
    ("buckets", "backward", "expected"),
    [
        ([600], 0.0, 6.0),
        ([600], 60.0, 6.0),  # it is full only when the backward pass has ended
        ([100, 200, 300], 0.0, 6.0),
        ([100, 200, 300], 1.0, 6.0 + 1 / 6 - 1),  # all of it waits for the first bucket
        ([100, 200, 300], 6.0, 3.0),  # full at 1, 3 and 6, sent by 2, 5 and 9
        ([100, 200, 300], 600.0, 3.0),  # the last is sent when it has ended
        ([300, 200, 100], 6.0, 3.0),  # full at 3, 5 and 6, sent by 6, 8 and 9
    ],
)
def test_buckets_travel_one_after_another_as_they_fill(
    buckets: list[int], backward: float, expected: float
) -> None:
    link = Link(bandwidth=100.0, latency=0.0)
    assert exposed(buckets, backward, link, ranks=2) == pytest.approx(expected)


def test_a_prediction_by_hand() -> None:
    ordinary, refresh = Kind(perturbs=True), Kind(perturbs=True, refreshes=True)
    timings = {ordinary: Timing(step=10.0, backward=4.0), refresh: Timing(step=30.0, backward=0.5)}
    moved = [Collective("batch size", 8), Collective("gradient", 100), Collective("gradient", 300)]
    collectives = {ordinary: moved, refresh: [*moved, Collective("Hessian", 400)]}
    kinds, link = Counter({ordinary: 3, refresh: 1}), Link(bandwidth=100.0, latency=0.25)

    found = predict(timings, collectives, kinds, link, ranks=2)
    # T: 0.58, 1.5, 3.5 and 4.5. The buckets are full at 1 and 4, and sent by 2.5 and 7.5: 3.5 after its end;
    # and on a refresh at 0.125 and 0.5, and sent by 1.625 and 5.125: 4.625 after it.
    assert found.alone == pytest.approx((3 * 10 + 30) / 4)
    assert found.size == pytest.approx((4 * 408 + 400) / 4)
    assert found.collectives == 3.25
    assert found.communication == pytest.approx(5.58 + 4.5 / 4)
    assert found.waiting == pytest.approx((3 * (0.58 + 3.5) + 0.58 + 4.625 + 4.5) / 4)
    assert found.step == found.alone + found.waiting

    waited = predict(timings, collectives, kinds, link, ranks=2, overlap=False)
    assert waited.waiting == waited.communication == pytest.approx(found.communication)
    one = predict(timings, collectives, kinds, link, ranks=1)
    assert one.step == one.alone == found.alone
    assert one.size == one.collectives == one.communication == 0


def test_both_gradients_of_a_synchronized_ascent_overlap_with_their_own_backward() -> None:
    kinds, link = Counter([Kind(True)]), Link(bandwidth=100.0, latency=0.0)
    moved = [Collective(f"{which}gradient", size) for which in ("ascent ", "") for size in (300, 100)]
    timings = {Kind(True): Timing(step=20.0, backward=4.0)}
    assert predict(timings, {Kind(True): moved}, kinds, link, ranks=2).waiting == pytest.approx(2 * 3)


# What is looked at


@pytest.mark.parametrize(
    ("algorithms", "expected"),
    [
        ([], {Kind(): 1}),
        ([SAM(0.1)], {Kind(True): 1}),
        ([SAM(0.1, interval=3)], {Kind(True): 1, Kind(): 2}),
        ([MSAM(0.1)], {Kind(True): 1}),
        ([LookSAM(0.1, interval=5)], {Kind(True): 1, Kind(): 4}),
    ],
)
def test_the_kinds_of_steps_without_a_hessian(algorithms: list, expected: dict[Kind, int]) -> None:
    run = trainer(sgd, algorithms)
    assert schedule(run.state.optimizers[0]) == expected
    run.close()


@pytest.mark.parametrize(
    ("algorithms", "expected"),
    [
        ([LazyHessian(4)], {Kind(False, True): 1, Kind(): 3}),
        ([Sassha(0.1)], {Kind(True, True): 1, Kind(True): 9}),
        (
            [Sassha(0.1, interval=2, hessian_interval=3)],
            {Kind(True, True): 1, Kind(True): 2, Kind(False, True): 1, Kind(): 2},
        ),
        ([MSassha(0.1, interval=2, hessian_interval=2)], {Kind(True, True): 1, Kind(): 1}),
    ],
)
def test_the_kinds_of_steps_with_a_hessian(algorithms: list, expected: dict[Kind, int]) -> None:
    run = trainer(sassha, algorithms)
    assert schedule(run.state.optimizers[0]) == expected
    run.close()


def test_only_trainable_parameters_of_the_optimizer_count() -> None:
    """DDP sends every gradient of the model; a mixture has those of the optimizer's parameters."""
    model = ComposerClassifier(
        nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 3), nn.Linear(3, 2)), num_classes=2
    )
    frozen, apart, ours = model.module
    frozen.requires_grad_(False)
    run = trainer(lambda _: sgd([*frozen.parameters(), *ours.parameters()]), [GSAM(0.1)], model=model)
    (optimizer,) = run.state.optimizers
    mixed, plain = (
        {c.purpose: c.size for c in traffic(optimizer, model, kind)} for kind in (Kind(True), Kind(False))
    )
    numbers = sum(p.numel() for p in ours.parameters())
    assert mixed["update"] == 4 * (numbers + 2) and "gradient" not in mixed
    assert plain["gradient"] == 4 * (numbers + sum(p.numel() for p in apart.parameters()))
    run.close()


def test_bfloat16_gradients_travel_as_they_are_and_are_mixed_in_float32() -> None:
    model = network().to(torch.bfloat16)
    run = trainer(sgd, [GSAM(0.1)], model=model)
    (optimizer,) = run.state.optimizers
    numbers, tensors = sum(p.numel() for p in model.parameters()), len([*model.parameters()])
    assert Collective("gradient", 2 * numbers) in traffic(optimizer, model, Kind())
    assert Collective("update", 4 * (numbers + tensors)) in traffic(optimizer, model, Kind(True))
    run.close()


def test_the_stopwatch_leaves_out_the_first_step_of_an_epoch() -> None:
    watch, now = Stopwatch(), 0.0
    for seconds in (100.0, 1.0, 3.0, 2.0):
        if seconds == 100:
            watch.tick("epoch_start", now, Kind())
        for event, after in (
            ("batch_start", 0.0),
            ("before_backward", 0.1),  # of the ascent
            ("after_backward", 0.2),
            ("before_backward", 0.5),
            ("after_backward", 0.75),
            ("batch_end", 1.0),
        ):
            # The kind counts that stands when the step starts.
            watch.tick(event, now + after * seconds, Kind(seconds != 2 and event == "batch_start"))
        now += 1000
    assert watch.medians() == {Kind(True): Timing(2.0, 0.5), Kind(): Timing(2.0, 0.5)}


# From end to end


def rows(text: str) -> dict[str, list[float]]:
    """The table's numbers by method."""
    lines = text.splitlines()
    end = next(i for i, line in enumerate(lines) if line.startswith("alone:"))
    table = [re.split(r"\s{2,}", line) for line in lines[2:end]]
    return {name: [float(cell.rstrip("%")) for cell in cells] for name, *cells in table}


def test_a_plan_of_the_digits(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = ["--plan", "digits", "--methods", "sam,sassha,msassha,gsam,looksam", "--ranks", "4"]
    assert main([*arguments, "--steps", "6", "--link", "1GB/s", "--latency", "0s", "model.width=8"]) == 0
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
    assert main(["--plan", config, "--steps", "1", "--ranks", "1"]) == 0
    out, _ = capsys.readouterr()
    (cells,) = rows(out).values()
    assert "/ sam" in out and cells[1:5] == [0, 0, 0, 0] and cells[6] == 1


@pytest.mark.timeout(300)
def test_two_ranks_print_what_is_predicted_and_measured(tmp_path: Path) -> None:
    root = Path(__file__).parents[1]
    command = [Path(sys.executable).with_name("composer"), "-n", "2", "-m", "composer_sassha.bench"]
    done = subprocess.run(
        [*command, "--plan", "--methods", "sassha", "--steps", "6", "model.width=4", "data.batch_size=8"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    out = done.stdout[: done.stdout.index("Left out")]
    assert out.startswith("digits on 2 ranks of 4 samples each, link ")
    assert out.splitlines()[1].split()[-3:] == ["/", "sgd", "off"]
    found = rows(out)
    assert [*found] == ["sgd", "sassha"]
    for *_, ratio, measured, true, off in found.values():
        # Both ratios are printed to within half a hundredth, and the percentage to half of one.
        rounded = 0.5 + 100 * (ratio + 0.005) / (true - 0.005) - 100 * ratio / true
        assert measured > 0 and off == pytest.approx(100 * (ratio / true - 1), abs=rounded)
    assert found["sgd"][6:9:2] == [1, 1] and not list(tmp_path.iterdir())
