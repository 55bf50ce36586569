"""The recipes of the papers: every row has the published numbers."""

import re
from pathlib import Path

import pytest
import torch

from composer_sassha.comparison.fairness import unfair_differences
from composer_sassha.comparison.grid import GridRun
from composer_sassha.recipes.config import Recipe, read_recipe
from composer_sassha.recipes.files import bundled_recipes
from composer_sassha.recipes.schedulers import Cosine, Linear
from tests.recipes.published import (
    COURSES,
    METHODS,
    NOT_PUBLISHED,
    PUBLISHED,
    ROWS,
    TABLES,
    kind_and_column,
    recipe,
    reported_of,
)


def test_every_recipe_is_listed_here() -> None:
    papers = ("cifar", "imagenet", "msam", "sam", "gsam", "ssam")
    assert {name for name in bundled_recipes() if name.startswith(papers)} == {*COURSES}
    assert {row for row in ROWS if row[0] not in TABLES} == PUBLISHED.keys() | NOT_PUBLISHED


@pytest.mark.parametrize("name", bundled_recipes())
def test_every_method_of_a_bundled_recipe_is_valid(name: str) -> None:
    for method in read_recipe(name)[1]:
        assert recipe(name, method).method == method


def rho_of(found: Recipe) -> float | None:
    rhos = [algorithm.rho for algorithm in found.algorithms.values() if hasattr(algorithm, "rho")]
    assert len(rhos) <= 1
    return rhos[0] if rhos else None


@pytest.mark.parametrize(("name", "method"), PUBLISHED)
def test_a_method_has_the_published_settings(name: str, method: str) -> None:
    lr, decay, rho, eps, interval, threshold = PUBLISHED[name, method]
    found = recipe(name, method)
    optimizer, algorithms = found.optimizer, found.algorithms
    assert optimizer.lr == lr and decay is not None and lr is not None
    if not hasattr(optimizer, "momentum") and not name.startswith("msam"):
        decay /= lr  # where it is decoupled, the authors of SASSHA divide it
    assert optimizer.weight_decay == pytest.approx(decay, rel=2e-5)
    assert getattr(optimizer, "momentum", 0.9) == 0.9
    assert rho_of(found) == rho
    kind, _ = kind_and_column(name, method)
    if kind in ("sassha", "msassha", "adahessian", "sophia_h"):
        assert optimizer.eps == (eps or 1e-4)
        assert optimizer.betas == (0.9, 0.999)
        (algorithm,) = algorithms.values()
        assert getattr(algorithm, "hessian_interval", algorithm.interval) == interval
    if kind == "sophia_h":
        assert optimizer.clip_threshold == threshold
    elif threshold is not None:
        clipping = algorithms["gradient_clipping"]
        assert (clipping.clipping_type, clipping.clipping_threshold) == ("norm", threshold)
    else:
        assert "gradient_clipping" not in algorithms


@pytest.mark.parametrize(
    "path", [path for name, path in bundled_recipes().items() if name in COURSES], ids=str
)
def test_a_decoupled_decay_is_the_quotient_in_its_comment(path: Path) -> None:
    """And that is of the row's learning rate."""
    rows = re.findall(
        r"optimizer:(?: # (\S+) / (\S+)\n *)? ?\{name: (\w+), lr: (\S+), (?:(?:momentum|nesterov): \S+ )*"
        r"weight_decay: ([^,}]+)[^}]*\}(?: # (\S+) / (\S+))?",
        path.read_text(),
    )
    assert len(rows) == path.read_text().count("optimizer:")
    divided = path.stem.startswith(("cifar", "imagenet"))
    for before, its_lr, name, lr, decay, behind, another_lr in rows:
        value, divisor = before or behind, its_lr or another_lr
        assert bool(value) == (divided and name != "sgd")
        if value:
            assert float(divisor) == float(lr)
            assert float(decay) == pytest.approx(float(value) / float(lr), rel=2e-5)


@pytest.mark.parametrize(("name", "method"), [row for row in ROWS if row[0] not in TABLES])
def test_a_method_is_what_it_is_called(name: str, method: str) -> None:
    found = recipe(name, method)
    names = set(found.algorithms) - {"gradient_clipping", "label_smoothing"}
    expected = {
        "sgd": ("SGD", set()),
        "adamw": ("AdamW", set()),
        "sam_sgd": ("SGD", {"sam"}),
        "sam_adamw": ("AdamW", {"sam"}),
        "msam": ("SGD", {"msam"}),
        "adamw_msam": ("AdamW", {"msam"}),
        "adahessian": ("AdaHessian", {"lazy_hessian"}),
        "sophia_h": ("Sophia", {"lazy_hessian"}),
        "sassha": ("SASSHA", {"sassha"}),
        "msassha": ("SASSHA", {"msassha"}),
    }
    kind, _ = kind_and_column(name, method)
    assert (type(found.optimizer).__name__, names) == expected[kind]
    if kind in ("sassha", "msassha"):
        assert found.optimizer.hessian_power == 0.5


@pytest.mark.parametrize("name", TABLES)
def test_a_row_differs_from_its_baseline_in_the_method_alone(name: str) -> None:
    lr, decay, columns = TABLES[name]
    kinds = {method.partition("_")[0] for method in METHODS[name]}
    assert {*METHODS[name]} == {
        "_".join(filter(None, [kind, column])) for kind in kinds for column in columns
    }
    for method in METHODS[name]:
        kind, column = kind_and_column(name, method)
        found = recipe(name, method)
        base = recipe(name, found.baseline or "")
        assert kind_and_column(name, base.method)[1] == column
        assert unfair_differences([GridRun(found, None), GridRun(base, None)]) == []
        assert found.optimizer == base.optimizer
        assert (found.optimizer.lr, found.optimizer.weight_decay) == (lr, decay)
        assert found.algorithms.keys() - base.algorithms.keys() == ({kind} if found != base else set())
        assert type(base.optimizer).__name__.lower() == base.method.partition("_")[0]


def test_a_row_of_a_table_has_what_it_is_called_after() -> None:
    plain = recipe("sam_cifar10_wrn28_10", "sam_basic").data
    for name in ("sam_cifar10_wrn28_10", "sam_cifar100_wrn28_10"):
        found = [recipe(name, f"sam_{column}").data for column in ("basic", "cutout", "autoaugment")]
        assert [data.cutout for data in found] == [0, 16, 0]
        assert [data.auto_augment for data in found] == [None, None, "cifar10"]
        assert all((data.padding, data.flip, data.label_noise) == (4, True, 0) for data in found)
    for rate in (20, 40, 60, 80):
        found = recipe("sam_cifar10_resnet32_noise", f"sam_{rate}")
        assert found.data.label_noise == rate / 100
        assert found.algorithms["sam"].rho == (0.05 if rate == 80 else 0.1)
    for size, patch in (("s", 32), ("s", 16), ("b", 32), ("b", 16)):
        found = recipe("gsam_imagenet_vit", f"gsam_{size}{patch}")
        assert (found.model.size, found.model.patch) == (size, patch)
        assert found.algorithms["gsam"].lr_min == pytest.approx(found.optimizer.lr * found.schedulers.alpha_f)
    for depth in (50, 101, 152):
        found = recipe("gsam_imagenet_resnet", f"gsam_{depth}")
        assert found.model.arch == f"resnet{depth}"
        assert found.algorithms["gsam"].lr_min == pytest.approx(found.optimizer.lr * found.schedulers.alpha_f)
    svhn, fashion = (recipe(f"sam_{name}_wrn28_10", "sam") for name in ("svhn", "fashion_mnist"))
    assert svhn.data.flip and fashion.data.flip and (svhn.data.padding, fashion.data.padding) == (4, 4)
    assert (svhn.model.in_channels, fashion.model.in_channels) == (3, 1)
    assert plain.batch_size == svhn.data.batch_size


@pytest.mark.parametrize("name", COURSES)
def test_a_recipe_has_the_published_course(name: str) -> None:
    epochs, batch, falls, number = COURSES[name]
    for method in METHODS[name]:
        found = recipe(name, method)
        assert (found.name, found.max_duration, found.data.batch_size) == (name, f"{epochs}ep", batch)
        schedule = found.schedulers
        if falls == "cosine":
            assert isinstance(schedule, Cosine)
            warmup = f"{number}ep" if number else "0ba"
            assert (schedule.t_warmup, schedule.alpha_f, schedule.t_max) == (warmup, 0, "1dur")
        elif falls == "linear":
            assert schedule == Linear(f"{number}ba", alpha_i=1, alpha_f=0.01, t_max="1dur")
        else:
            assert (tuple(schedule.milestones), schedule.gamma, schedule.t_warmup) == (falls, number, "0ba")
        assert found.reported == reported_of(name, method)
        _, column = kind_and_column(name, method)
        if name not in TABLES:
            assert getattr(found.data, "label_noise", 0) == (int(column) / 100 if column else 0)


@pytest.mark.parametrize("name", ["cifar10_resnet32_noise", "cifar100_resnet32_noise"])
def test_a_noisy_row_has_the_baseline_of_its_rate(name: str) -> None:
    for method in METHODS[name]:
        rate = kind_and_column(name, method)[1]
        found = recipe(name, method)
        assert found.baseline == f"sgd_{rate}" and rate in ("20", "40", "60", "80")
        assert unfair_differences([GridRun(found, None), GridRun(recipe(name, found.baseline), None)]) == []


@pytest.mark.parametrize("name", COURSES)
def test_a_model_has_an_output_for_every_class(name: str) -> None:
    found = recipe(name, METHODS[name][0])
    classes = {"CIFAR100": 100, "ImageNet": 1000}.get(type(found.data).__name__, 10)
    with torch.device("meta"):
        module = found.model.build().module
    assert [m for m in module.modules() if isinstance(m, torch.nn.Linear)][-1].out_features == classes
