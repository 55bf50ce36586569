"""The recipes of the papers: their numbers are the published ones, and every method of each trains."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from composer_sassha.recipes.config import Recipe, load_recipe
from composer_sassha.recipes.data import CIFAR10, CIFAR100
from composer_sassha.recipes.data.images import Split
from composer_sassha.recipes.files import bundled_recipes
from composer_sassha.recipes.run import run
from composer_sassha.recipes.schedulers import Cosine
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
        for rate in (20, 40, 60)
    },
    "imagenet_resnet50": (90, 256, ("30ep", "60ep"), 0.1),
    "imagenet_vit_s32": (90, 1024, "cosine", 8),
    "msam_cifar100_wrn16_4": (200, 256, "cosine", 1),
    "msam_cifar100_resnet50": (200, 256, "cosine", 1),
    "msam_imagenet_resnet50": (100, 1024, "cosine", 1),
    "msam_imagenet_vit_s32": (90, 1024, "cosine", 8),
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
ROWS = [
    (name, method)
    for name in COURSES
    for method in [key[1] for key in sorted(PUBLISHED.keys() | NOT_PUBLISHED) if key[0] == name]
]


def recipe(name: str, method: str, *overrides: str) -> Recipe:
    return load_recipe(name, [f"method={method}", *overrides])


def test_every_recipe_is_listed_here() -> None:
    assert {name for name in bundled_recipes() if name.startswith(("cifar", "imagenet", "msam"))} == {
        *COURSES
    }


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


@pytest.mark.parametrize(("name", "method"), ROWS)
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
        assert found.optimizer.hessian_power == (0.5 if method == "sassha" else 1.0)


@pytest.mark.parametrize("name", COURSES)
def test_a_recipe_has_the_published_course(name: str) -> None:
    epochs, batch, falls, number = COURSES[name]
    for method in [method for recipe_name, method in ROWS if recipe_name == name]:
        found = recipe(name, method)
        assert (found.name, found.max_duration, found.data.batch_size) == (name, f"{epochs}ep", batch)
        schedule = found.schedulers
        if falls == "cosine":
            assert isinstance(schedule, Cosine)
            assert (schedule.t_warmup, schedule.alpha_f, schedule.t_max) == (f"{number}ep", 0, "1dur")
        else:
            assert (tuple(schedule.milestones), schedule.gamma, schedule.t_warmup) == (falls, number, "0ba")
        assert found.reported == REPORTED.get(name, {}).get(method)
        assert getattr(found.data, "label_noise", 0) == (int(name[-2:]) / 100 if "noise" in name else 0)


@pytest.mark.parametrize("name", COURSES)
def test_a_model_has_an_output_for_every_class(name: str) -> None:
    found = recipe(name, ROWS[[row[0] for row in ROWS].index(name)][1])
    classes = {"CIFAR10": 10, "CIFAR100": 100, "ImageNet": 1000}[type(found.data).__name__]
    with torch.device("meta"):
        module = found.model.build().module
    assert [m for m in module.modules() if isinstance(m, torch.nn.Linear)][-1].out_features == classes


def generated(classes: int, count: int) -> Split:
    generator = torch.Generator().manual_seed(classes)
    pixels = torch.randint(256, (count, 3, 32, 32), generator=generator, dtype=torch.uint8)
    labels = torch.randint(classes, (count,), generator=generator)
    labels[0] = classes - 1
    return Split(pixels, labels)


SMALL = {  # overrides that leave the rest of the recipe as it is
    "cifar": ["data.batch_size=4"],
    "imagenet": ["data.batch_size=4", "data.crop=64", "data.resize=72", "data.workers=0"],
    "cifar100_wrn28_10": ["model.depth=10", "model.widen=1"],
    "imagenet_resnet50": ["model.arch=resnet18"],
    "msam_cifar100_resnet50": ["model.arch=resnet18"],
    "imagenet_vit_s32": ["model.size=ti", "model.image_size=64"],
}
QUICK = "cifar10_resnet20"


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], list[str]]:
    """Put generated images in the data sets' place, and return the overrides that make a recipe small."""
    for schema, classes in ((CIFAR10, 10), (CIFAR100, 100)):
        monkeypatch.setattr(schema, "split", lambda *_, classes=classes, **__: generated(classes, 100))

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
    results = run(recipe(name, method, *small(name), f"save_folder={tmp_path}", "max_duration=2ba"))
    assert results["steps"] == 2
    assert results["loss"] is not None or method == "msassha"  # which diverges at the power of its authors
    assert results["reported"] == REPORTED.get(name, {}).get(method)


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
    overrides = [*small(name), *settings, "max_duration=2ep", "save_interval=1ba", "schedulers=null"]
    if "cifar" in name:
        overrides.append("model.depth=8")
    whole, parts = (
        recipe(name, "sassha", *overrides, f"save_folder={tmp_path / part}") for part in ("whole", "parts")
    )
    run(whole)
    for event, batch in [("batch_end", 2), ("batch_start", 6)]:
        with pytest.raises(KeyboardInterrupt):
            run(parts, [Stop(event, batch)])
    run(parts)
    same_runs(whole, parts)
