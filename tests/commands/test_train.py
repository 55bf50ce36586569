"""The command `train`: its help, and what it refuses."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.commands import SMALL, refused, train
from tests.recipes.runs import without_curves

__all__ = ["without_curves"]

QUICK = ["digits", "method=sgd", "max_duration=2ep", *SMALL]
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


def test_help_names_recipes_without_importing_torch() -> None:
    code = "import runpy, sys; sys.argv[1:] = ['train', '--help']\n"
    code += "try: runpy.run_module('composer_sassha', run_name='__main__')\n"
    code += "finally: assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "digits                     sgd, adamw, sam, sam_adamw, asam, gsam" in done.stdout


def test_only_the_first_rank_speaks(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "1")
    assert train(["seed=abc"]) == 2
    assert capsys.readouterr() == ("", "")


@pytest.mark.usefixtures("without_curves")
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
def test_a_mistake_shown_by_the_first_step_can_be_mended(
    mistake: list[str], mended: list[str], parts: list[str], folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    quick = ["max_duration=4ba", *SMALL]
    message = refused([*mistake, *quick], capsys)
    assert all(part in message for part in parts), message
    assert train([*mended, *quick]) == 0
