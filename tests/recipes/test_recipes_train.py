"""The recipes of the papers: every method of each trains, on generated images."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from composer_sassha.recipes.data import CIFAR10, CIFAR100, SVHN, FashionMNIST
from composer_sassha.recipes.data.images import Split
from composer_sassha.recipes.run import train_recipe
from tests.recipes.published import ROWS, recipe, reported_of
from tests.recipes.runs import same_runs, stopped
from tests.recipes.test_folders import photographs


def generated(classes: int, count: int, shape: tuple[int, int, int] = (3, 32, 32)) -> Split:
    generator = torch.Generator().manual_seed(classes)
    pixels = torch.randint(256, (count, *shape), generator=generator, dtype=torch.uint8)
    labels = torch.randint(classes, (count,), generator=generator)
    labels[0] = classes - 1
    return Split(pixels, labels)


SMALL = {  # overrides that leave the rest of the recipe as it is
    "": ["data.batch_size=4"],
    "resnet20": ["model.depth=8"],
    "resnet32": ["model.depth=8"],
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
        ("cifar10_resnet32_noise", ["data.batch_size=20", "data.evaluate_on=validation"]),
        ("imagenet_vit_s32", ["data.workers=1"]),
    ],
)
def test_a_continued_run_sees_the_same_images(
    name: str, settings: list[str], tmp_path: Path, small: Callable[[str], list[str]]
) -> None:
    overrides = [setting for setting in small(name) if not setting.startswith("model.")]
    overrides += [*settings, "max_duration=2ep", "save_interval=1ba", "schedulers=null"]
    # Any model that is fast; its loss shows other images as it shows other weights.
    overrides += ["model.name=resnet_cifar", "model.depth=8", "model.width=2", "model.num_classes=100"]
    method = "sgd_40" if "noise" in name else "sgd"
    whole, parts = (
        recipe(name, method, *overrides, f"save_folder={tmp_path / part}") for part in ("whole", "parts")
    )
    train_recipe(whole)
    stopped(parts, ("batch_start", 6))  # within the second epoch
    train_recipe(parts)
    same_runs(whole, parts)
