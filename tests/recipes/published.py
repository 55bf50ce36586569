"""The published numbers of the recipes' rows, and the rows themselves."""

from functools import cache
from typing import Any

import pytest

from composer_sassha.recipes.config import Recipe, load_recipe, read_recipe

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
cifar10_resnet32_noise:
  adahessian_20 0.1    5e-4   -     -     1   -
  msassha_20    0.15   1e-3   0.8   -     10  -
  sam_sgd_20    0.1    1e-3   0.2   -     -   -
  sassha_20     0.1    1e-3   0.1   -     10  -
  sgd_20        0.015  2e-3   -     -     -   -
  sophia_h_20   1e-3   5e-4   -     1e-4  1   0.1
  adahessian_40 0.1    5e-4   -     -     1   -
  msassha_40    0.05   1e-3   0.25  -     10  -
  sam_sgd_40    0.1    5e-4   0.2   -     -   -
  sassha_40     0.1    5e-4   0.2   -     10  -
  sgd_40        0.015  2e-3   -     -     -   -
  sophia_h_40   1e-3   5e-4   -     1e-4  1   0.1
  adahessian_60 0.05   5e-4   -     -     1   -
  msassha_60    0.05   1e-3   0.25  -     10  -
  sam_sgd_60    0.03   1e-3   0.1   -     -   -
  sassha_60     0.1    5e-4   0.2   -     10  -
  sgd_60        0.05   1e-3   -     -     -   -
  sophia_h_60   1e-3   5e-4   -     1e-4  1   0.1
  adahessian_80 0.05   5e-4   -     -     1   -
  msassha_80    0.05   1e-3   0.25  -     10  -
  sam_sgd_80    0.03   1e-3   0.1   -     -   -
  sassha_80     0.1    5e-4   0.2   -     10  -
  sgd_80        0.05   1e-3   -     -     -   -
  sophia_h_80   1e-3   5e-4   -     1e-4  1   0.1
cifar100_resnet32_noise:
  adahessian_20 0.0015 5e-4   -     -     1   -
  msassha_20    0.15   1e-3   0.8   -     10  -
  sam_sgd_20    0.1    1e-3   0.2   -     -   -
  sassha_20     0.1    5e-4   0.1   -     10  -
  sgd_20        5e-4   2e-3   -     -     -   -
  sophia_h_20   1e-5   5e-4   -     1e-4  1   0.05
  adahessian_40 1e-3   5e-4   -     -     1   -
  msassha_40    0.15   1e-3   0.8   -     10  -
  sam_sgd_40    0.01   1e-3   0.1   -     -   -
  sassha_40     0.1    5e-4   0.2   -     10  -
  sgd_40        5e-4   2e-3   -     -     -   -
  sophia_h_40   1e-5   5e-4   -     1e-4  1   0.1
  adahessian_60 1e-2   5e-4   -     -     1   -
  msassha_60    0.15   1e-3   0.8   -     10  -
  sam_sgd_60    0.03   1e-3   0.1   -     -   -
  sassha_60     0.1    5e-4   0.2   -     10  -
  sgd_60        5e-4   2e-3   -     -     -   -
  sophia_h_60   1e-5   5e-4   -     1e-4  1   0.1
  adahessian_80 1e-2   5e-4   -     -     1   -
  msassha_80    0.15   1e-3   0.8   -     10  -
  sam_sgd_80    0.03   1e-3   0.1   -     -   -
  sassha_80     0.1    5e-4   0.2   -     10  -
  sgd_80        5e-4   2e-3   -     -     -   -
  sophia_h_80   1e-5   5e-4   -     1e-4  1   0.1
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
    "cifar10_resnet32_noise": (160, 256, STEPS, 0.1),
    "cifar100_resnet32_noise": (160, 256, STEPS, 0.1),
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


def _numbers() -> dict[tuple[str, str], list[float | None]]:
    """The numbers of `SETTINGS` by recipe and method."""
    found, recipe = {}, ""
    for line in SETTINGS.strip().splitlines():
        first, *rest = line.split()
        if rest:
            found[recipe, first] = [None if value == "-" else float(value) for value in rest]
        else:
            recipe = first.removesuffix(":")
    return found


PUBLISHED = _numbers()
METHODS = {name: list(read_recipe(name)[1]) for name in COURSES}
ROWS = [(name, method) for name in COURSES for method in METHODS[name]]


@cache  # reading takes a while; nothing here changes a recipe
def recipe(name: str, method: str, *overrides: str) -> Recipe:
    """Load a row of a recipe."""
    return load_recipe(name, [f"method={method}", *overrides])


def kind_and_column(name: str, method: str) -> tuple[str, str]:
    """Split the name of a row into its method and its column of the paper's table; "" if there is one."""
    if name in TABLES:
        kind, _, column = method.partition("_")
        return kind, column
    kind, _, column = method.rpartition("_") if name.endswith("_noise") else (method, "", "")
    return kind, column


def reported_of(name: str, method: str) -> float | None:
    """Return what the paper has for a row, as an accuracy in percent."""
    if name not in TABLES:
        return REPORTED.get(name, {}).get(method)
    kind, column = kind_and_column(name, method)
    numbers = TABLES[name][2][column]
    place = {"sam": 1, "gsam": 2}.get(kind, 0)
    if place >= len(numbers):
        return None
    errors = name.startswith("sam_") and "noise" not in name
    return pytest.approx(100 - numbers[place] if errors else numbers[place], abs=1e-9)
