"""The recipes of the papers: their numbers are the published ones, and every method of each trains."""

import re
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from composer_sassha.comparison.fairness import unfair_differences
from composer_sassha.comparison.grid import GridRun
from composer_sassha.recipes.config import Recipe, load_recipe, read_recipe
from composer_sassha.recipes.data import CIFAR10, CIFAR100, SVHN, FashionMNIST
from composer_sassha.recipes.data.images import Split
from composer_sassha.recipes.files import bundled_recipes
from composer_sassha.recipes.run import train_recipe
from composer_sassha.recipes.schedulers import Cosine, Linear
from tests.recipes.test_data import photographs
from tests.recipes.test_run import Stop, same_runs

# What the authors' commands say: learning rate, weight decay, rho, eps, refresh interval, and the threshold
# that clips (Sophia's entries, or AdamW's gradient). - stands for what a command leaves to its default.
SETTINGS = """
cifar10_resnet20:
  adahessian 0.15   5e-4   -     -     1   -
  adamw      0.01   5e-4   -     -     -   -
  msassha    0.3    1e-3   0.8   -     10  -
  sam_sgd    0.1    5e-4   0.15  -     -   -
  sassha     0.15   5e-4   0.2   1e-6  10  -
  sgd        0.1    5e-4   -     -     -   -
  sophia_h   1e-3   1e-3   -     1e-4  1   0.01
cifar10_resnet32:
  adahessian 0.15   5e-4   -     -     1   -
  adamw      0.01   5e-4   -     -     -   -
  msassha    0.15   1e-3   0.6   -     10  -
  sam_sgd    0.1    5e-4   0.15  -     -   -
  sassha     0.15   5e-4   0.2   -     10  -
  sgd        0.1    5e-4   -     -     -   -
  sophia_h   1e-3   2e-4   -     1e-4  1   0.1
cifar100_resnet32:
  adahessian 0.15   5e-4   -     -     1   -
  adamw      0.01   5e-4   -     -     -   -
  msassha    0.3    1e-3   0.6   -     10  -
  sam_sgd    0.1    5e-4   0.2   -     -   -
  sassha     0.3    1e-3   0.25  1e-6  10  -
  sgd        0.1    5e-4   -     -     -   -
  sophia_h   1e-3   2e-4   -     1e-4  1   0.05
cifar100_wrn28_10:
  adahessian 0.3    5e-4   -     -     1   -
  adamw      1e-3   5e-4   -     -     -   -
  msassha    0.15   1e-3   0.25  -     10  -
  sam_sgd    0.1    1e-3   0.15  -     -   -
  sassha     0.15   0.0015 0.2   -     10  -
  sgd        0.1    5e-4   -     -     -   -
  sophia_h   1e-3   1e-3   -     1e-4  1   0.01
imagenet_resnet50:
  adahessian 0.15   1e-4   -     -     1   -
  adamw      1e-3   1e-4   -     -     -   -
  msassha    0.15   1e-4   0.1   -     10  -
  sam_sgd    0.1    1e-4   0.1   -     -   -
  sassha     0.3    1e-4   0.2   -     10  -
  sgd        0.1    1e-4   -     -     -   -
  sophia_h   1e-2   1e-4   -     1e-4  1   0.1
imagenet_vit_s32:
  adahessian 0.15   1e-4   -     -     1   -
  adamw      1e-3   1e-4   -     -     -   1
  msassha    0.6    4e-4   0.4   1e-6  10  -
  sam_adamw  1e-3   1e-4   0.2   -     -   1
  sassha     0.6    2e-4   0.25  1e-6  10  -
  sgd        0.1    1e-4   -     -     -   -
  sophia_h   1e-3   1e-4   -     1e-4  1   0.01
cifar10_resnet32_noise20:
  adahessian 0.1    5e-4   -     -     1   -
  msassha    0.15   1e-3   0.8   -     10  -
  sam_sgd    0.1    1e-3   0.2   -     -   -
  sassha     0.1    1e-3   0.1   -     10  -
  sgd        0.015  2e-3   -     -     -   -
  sophia_h   1e-3   5e-4   -     1e-4  1   0.1
cifar10_resnet32_noise40:
  adahessian 0.1    5e-4   -     -     1   -
  msassha    0.05   1e-3   0.25  -     10  -
  sam_sgd    0.1    5e-4   0.2   -     -   -
  sassha     0.1    5e-4   0.2   -     10  -
  sgd        0.015  2e-3   -     -     -   -
  sophia_h   1e-3   5e-4   -     1e-4  1   0.1
cifar10_resnet32_noise60:
  adahessian 0.05   5e-4   -     -     1   -
  msassha    0.05   1e-3   0.25  -     10  -
  sam_sgd    0.03   1e-3   0.1   -     -   -
  sassha     0.1    5e-4   0.2   -     10  -
  sgd        0.05   1e-3   -     -     -   -
  sophia_h   1e-3   5e-4   -     1e-4  1   0.1
cifar10_resnet32_noise80:
  adahessian 0.05   5e-4   -     -     1   -
  msassha    0.05   1e-3   0.25  -     10  -
  sam_sgd    0.03   1e-3   0.1   -     -   -
  sassha     0.1    5e-4   0.2   -     10  -
  sgd        0.05   1e-3   -     -     -   -
  sophia_h   1e-3   5e-4   -     1e-4  1   0.1
cifar100_resnet32_noise20:
  adahessian 0.0015 5e-4   -     -     1   -
  msassha    0.15   1e-3   0.8   -     10  -
  sam_sgd    0.1    1e-3   0.2   -     -   -
  sassha     0.1    5e-4   0.1   -     10  -
  sgd        5e-4   2e-3   -     -     -   -
  sophia_h   1e-5   5e-4   -     1e-4  1   0.05
cifar100_resnet32_noise40:
  adahessian 1e-3   5e-4   -     -     1   -
  msassha    0.15   1e-3   0.8   -     10  -
  sam_sgd    0.01   1e-3   0.1   -     -   -
  sassha     0.1    5e-4   0.2   -     10  -
  sgd        5e-4   2e-3   -     -     -   -
  sophia_h   1e-5   5e-4   -     1e-4  1   0.1
cifar100_resnet32_noise60:
  adahessian 1e-2   5e-4   -     -     1   -
  msassha    0.15   1e-3   0.8   -     10  -
  sam_sgd    0.03   1e-3   0.1   -     -   -
  sassha     0.1    5e-4   0.2   -     10  -
  sgd        5e-4   2e-3   -     -     -   -
  sophia_h   1e-5   5e-4   -     1e-4  1   0.1
cifar100_resnet32_noise80:
  adahessian 1e-2   5e-4   -     -     1   -
  msassha    0.15   1e-3   0.8   -     10  -
  sam_sgd    0.03   1e-3   0.1   -     -   -
  sassha     0.1    5e-4   0.2   -     10  -
  sgd        5e-4   2e-3   -     -     -   -
  sophia_h   1e-5   5e-4   -     1e-4  1   0.1
msam_cifar100_wrn16_4:
  sgd        0.5    0.0005 -     -     -   -
  sam_sgd    0.5    0.0005 0.2   -     -   -
  msam       0.5    0.0005 3     -     -   -
msam_cifar100_resnet50:
  sgd        0.1    0.001  -     -     -   -
  sam_sgd    0.1    0.001  0.2   -     -   -
  msam       0.1    0.001  3     -     -   -
msam_imagenet_resnet50:
  sgd        1.0    0.0001 -     -     -   -
  sam_sgd    1.0    0.0001 0.2   -     -   -
  msam       1.0    0.0001 3     -     -   -
msam_imagenet_vit_s32:
  adamw      0.001  0.1    -     -     -   1.0
  sam_adamw  0.001  0.1    0.2   -     -   1.0
  adamw_msam 0.001  0.1    3     -     -   1.0
"""

# Recipes that hold several columns of a paper, for each model, augmentation or rate of noise: learning rate,
# weight decay, and by the second part of their rows' names what is published for the baseline, SAM and GSAM.
# Those of SAM's paper are errors, but for its noise. A recipe with one column has no second part.
TABLES: dict[str, tuple[float, float, dict[str, tuple[float, ...]]]] = {
    "sam_cifar10_wrn28_10": (
        0.1,
        5e-4,
        {"basic": (3.5, 2.7), "cutout": (2.6, 2.3), "autoaugment": (2.3, 2.1)},
    ),
    "sam_cifar100_wrn28_10": (
        0.1,
        5e-4,
        {"basic": (18.8, 16.5), "cutout": (16.9, 14.9), "autoaugment": (15.8, 13.6)},
    ),
    "sam_svhn_wrn28_10": (0.1, 5e-4, {"": (1.58, 1.42)}),
    "sam_fashion_mnist_wrn28_10": (0.1, 5e-4, {"": (4.57, 3.98)}),
    "sam_cifar10_resnet32_noise": (
        0.1,
        5e-4,
        {"20": (84.8, 95.1), "40": (68.8, 93.4), "60": (48.2, 90.5), "80": (26.2, 77.9)},
    ),
    "gsam_imagenet_vit": (
        3e-3,
        0.3,
        {
            "s32": (68.4, 70.5, 73.8),
            "s16": (74.4, 78.1, 79.5),
            "b32": (71.4, 73.6, 76.8),
            "b16": (74.6, 79.9, 81.0),
        },
    ),
    "gsam_imagenet_resnet": (
        1.6,
        1e-4,
        {"50": (76.0, 76.9, 77.2), "101": (77.8, 78.6, 78.9), "152": (78.5, 79.3, 80.0)},
    ),
    "ssam_cifar10_resnet20": (0.05, 5e-4, {"": ()}),
}

# In the tables of results, but without settings: the recipe says whose it takes.
NOT_PUBLISHED = {
    ("cifar10_resnet20", "sam_adamw"),
    ("cifar10_resnet32", "sam_adamw"),
    ("cifar100_resnet32", "sam_adamw"),
    ("cifar100_wrn28_10", "sam_adamw"),
    ("imagenet_resnet50", "sam_adamw"),
    ("imagenet_vit_s32", "sam_sgd"),
}

# Accuracies of the SASSHA paper, in percent.
REPORTED = {
    "cifar10_resnet20": {
        "sgd": 92.03,
        "adamw": 92.04,
        "sam_sgd": 92.85,
        "sam_adamw": 92.77,
        "adahessian": 92.00,
        "sophia_h": 91.81,
        "sassha": 92.98,
    },
    "cifar100_resnet32": {
        "sgd": 69.32,
        "adamw": 68.78,
        "sam_sgd": 71.99,
        "sam_adamw": 71.15,
        "adahessian": 68.06,
        "sophia_h": 67.76,
        "sassha": 72.14,
    },
    "cifar100_wrn28_10": {
        "sgd": 80.06,
        "adamw": 79.09,
        "sam_sgd": 83.14,
        "sam_adamw": 82.88,
        "adahessian": 76.92,
        "sophia_h": 79.35,
        "sassha": 83.54,
    },
    "imagenet_resnet50": {
        "sgd": 75.58,
        "adamw": 75.38,
        "sam_sgd": 76.36,
        "sam_adamw": 76.35,
        "adahessian": 73.64,
        "sophia_h": 72.06,
        "sassha": 76.43,
    },
    "imagenet_vit_s32": {
        "sgd": 62.90,
        "adamw": 66.46,
        "sam_sgd": 64.54,
        "sam_adamw": 68.31,
        "adahessian": 66.42,
        "sophia_h": 62.44,
        "sassha": 69.20,
    },
}

# Epochs, batch size, when and by how much the learning rate falls or the epochs of its warm-up.
STEPS = ("80ep", "120ep")
COURSES: dict[str, tuple[int, int, Any, float]] = {
    "cifar10_resnet20": (160, 256, STEPS, 0.1),
    "cifar10_resnet32": (160, 256, STEPS, 0.1),
    "cifar100_resnet32": (160, 256, STEPS, 0.1),
    "cifar100_wrn28_10": (200, 256, ("60ep", "120ep", "160ep"), 0.2),
    **{
        f"{data}_resnet32_noise{rate}": (160, 256, STEPS, 0.1)
        for data in ("cifar10", "cifar100")
        for rate in (20, 40, 60, 80)
    },
    "imagenet_resnet50": (90, 256, ("30ep", "60ep"), 0.1),
    "imagenet_vit_s32": (90, 1024, "cosine", 8),
    "msam_cifar100_wrn16_4": (200, 256, "cosine", 1),
    "msam_cifar100_resnet50": (200, 256, "cosine", 1),
    "msam_imagenet_resnet50": (100, 1024, "cosine", 1),
    "msam_imagenet_vit_s32": (90, 1024, "cosine", 8),
    "sam_cifar10_wrn28_10": (200, 256, "cosine", 0),
    "sam_cifar100_wrn28_10": (200, 256, "cosine", 0),
    "sam_svhn_wrn28_10": (200, 256, "cosine", 0),
    "sam_fashion_mnist_wrn28_10": (200, 256, "cosine", 0),
    "sam_cifar10_resnet32_noise": (200, 256, "cosine", 0),
    "gsam_imagenet_vit": (300, 4096, "linear", 10_000),
    "gsam_imagenet_resnet": (90, 4096, "linear", 5_000),
    "ssam_cifar10_resnet20": (200, 128, "cosine", 0),
}


def published() -> dict[tuple[str, str], list[float | None]]:
    """The numbers of `SETTINGS` by recipe and method."""
    found, recipe = {}, ""
    for line in SETTINGS.strip().splitlines():
        first, *rest = line.split()
        if rest:
            found[recipe, first] = [None if value == "-" else float(value) for value in rest]
        else:
            recipe = first.removesuffix(":")
    return found


PUBLISHED = published()
METHODS = {name: list(read_recipe(name)[1]) for name in COURSES}
ROWS = [(name, method) for name in COURSES for method in METHODS[name]]


@cache  # reading takes a while; nothing here changes a recipe
def recipe(name: str, method: str, *overrides: str) -> Recipe:
    return load_recipe(name, [f"method={method}", *overrides])


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
    if method in ("sassha", "msassha", "adahessian", "sophia_h"):
        assert optimizer.eps == (eps or 1e-4)
        assert optimizer.betas == (0.9, 0.999)
        (algorithm,) = algorithms.values()
        assert getattr(algorithm, "hessian_interval", algorithm.interval) == interval
    if method == "sophia_h":
        assert optimizer.clip_threshold == threshold
    elif threshold is not None:
        clipping = algorithms["gradient_clipping"]
        assert (clipping.clipping_type, clipping.clipping_threshold) == ("norm", threshold)
    else:
        assert "gradient_clipping" not in algorithms


@pytest.mark.parametrize(
    "path", [path for name, path in bundled_recipes().items() if name in COURSES], ids=str
)
def test_a_decoupled_weight_decay_is_the_quotient_beside_it(path: Path) -> None:
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
    assert (type(found.optimizer).__name__, names) == expected[method]
    if method in ("sassha", "msassha"):
        assert found.optimizer.hessian_power == 0.5


def reported_of(name: str, method: str) -> float | None:
    """What the paper has for a row, as an accuracy in percent."""
    if name not in TABLES:
        return REPORTED.get(name, {}).get(method)
    kind, _, column = method.partition("_")
    published = TABLES[name][2][column]
    place = {"sam": 1, "gsam": 2}.get(kind, 0)
    if place >= len(published):
        return None
    errors = name.startswith("sam_") and "noise" not in name
    return pytest.approx(100 - published[place] if errors else published[place], abs=1e-9)


@pytest.mark.parametrize("name", TABLES)
def test_a_row_of_a_table_differs_from_its_baseline_in_the_method_alone(name: str) -> None:
    lr, decay, columns = TABLES[name]
    kinds = {method.partition("_")[0] for method in METHODS[name]}
    assert {*METHODS[name]} == {
        "_".join(filter(None, [kind, column])) for kind in kinds for column in columns
    }
    for method in METHODS[name]:
        kind, _, column = method.partition("_")
        found = recipe(name, method)
        base = recipe(name, found.baseline or "")
        assert base.method.partition("_")[2] == column
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
        rate = re.search(r"_noise(\d+)$", name)
        if name not in TABLES:
            assert getattr(found.data, "label_noise", 0) == (int(rate[1]) / 100 if rate else 0)


@pytest.mark.parametrize("name", COURSES)
def test_a_model_has_an_output_for_every_class(name: str) -> None:
    found = recipe(name, METHODS[name][0])
    classes = {"CIFAR100": 100, "ImageNet": 1000}.get(type(found.data).__name__, 10)
    with torch.device("meta"):
        module = found.model.build().module
    assert [m for m in module.modules() if isinstance(m, torch.nn.Linear)][-1].out_features == classes


def generated(classes: int, count: int, shape: tuple[int, int, int] = (3, 32, 32)) -> Split:
    generator = torch.Generator().manual_seed(classes)
    pixels = torch.randint(256, (count, *shape), generator=generator, dtype=torch.uint8)
    labels = torch.randint(classes, (count,), generator=generator)
    labels[0] = classes - 1
    return Split(pixels, labels)


SMALL = {  # overrides that leave the rest of the recipe as it is
    "": ["data.batch_size=4"],
    "imagenet": ["data.crop=64", "data.resize=72", "data.workers=0"],
    "wrn28_10": ["model.depth=10", "model.widen=1"],
    "gsam": ["schedulers.t_warmup=0ba"],
    "imagenet_resnet": ["model.arch=resnet18"],
    "msam_cifar100_resnet50": ["model.arch=resnet18"],
    "imagenet_vit": ["model.size=ti", "model.image_size=64"],
}
QUICK = "cifar10_resnet20"


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], list[str]]:
    """Put generated images in the data sets' place, and return the overrides that make a recipe small."""
    for schema, classes in ((CIFAR10, 10), (CIFAR100, 100), (SVHN, 10)):
        monkeypatch.setattr(schema, "split", lambda *_, classes=classes, **__: generated(classes, 100))
    monkeypatch.setattr(FashionMNIST, "split", lambda *_, **__: generated(10, 100, (1, 28, 28)))

    def overrides(name: str) -> list[str]:
        found = [setting for part, settings in SMALL.items() if part in name for setting in settings]
        if "imagenet" in name:
            found.append(f"data.root={photographs(tmp_path / 'photographs')}")
        return [*found, "progress_bar=false"]

    return overrides


@pytest.mark.parametrize(
    ("name", "method"),
    [pytest.param(*row, marks=[] if row[0] == QUICK else pytest.mark.slow) for row in ROWS],
)
def test_every_method_trains(
    name: str, method: str, tmp_path: Path, small: Callable[[str], list[str]]
) -> None:
    results = train_recipe(recipe(name, method, *small(name), f"save_folder={tmp_path}", "max_duration=2ba"))
    assert results["steps"] == 2
    assert results["loss"] is not None
    assert results["reported"] == reported_of(name, method)


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("cifar10_resnet20", ["data.batch_size=25", "data.cutout=8", "data.auto_augment=cifar10"]),
        ("cifar10_resnet32_noise40", ["data.batch_size=20", "data.evaluate_on=validation"]),
        ("imagenet_vit_s32", ["data.workers=1"]),
    ],
)
def test_a_continued_run_sees_the_same_images(
    name: str, settings: list[str], tmp_path: Path, small: Callable[[str], list[str]]
) -> None:
    overrides = [setting for setting in small(name) if not setting.startswith("model.")]
    overrides += [*settings, "max_duration=2ep", "save_interval=1ba", "schedulers=null"]
    overrides += ["model.name=resnet_cifar", "model.depth=8", "model.num_classes=100"]  # any that is fast
    whole, parts = (
        recipe(name, "sassha", *overrides, f"save_folder={tmp_path / part}") for part in ("whole", "parts")
    )
    train_recipe(whole)
    for event, batch in [("batch_end", 2), ("batch_start", 6)]:
        with pytest.raises(KeyboardInterrupt):
            train_recipe(parts, [Stop(event, batch)])
    train_recipe(parts)
    same_runs(whole, parts)
