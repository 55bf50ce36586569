"""The models: as large as published, for the images that they are meant for, and what they refuse."""

from typing import Any

import pytest
import torch
from torch import nn

from composer_sassha.recipes.errors import ConfigError
from composer_sassha.recipes.models import MODELS, CIFARResNet, Torchvision, ViT, WideResNet
from composer_sassha.recipes.schema import parse


def parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(("depth", "count"), [(20, 269_722), (32, 464_154), (56, 853_018)])
def test_as_large_as_in_the_paper(depth: int, count: int) -> None:
    """Table 6 of He et al. says 0.27, 0.46 and 0.85 million; shortcuts have no parameters (option A)."""
    model = CIFARResNet(depth, num_classes=10)
    assert parameters(model) == count
    layers = [m for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    assert len(layers) == depth


@pytest.mark.parametrize(
    ("depth", "widen", "classes", "millions"),
    [(16, 4, 10, 2.75), (28, 10, 10, 36.5), (28, 10, 100, 36.5), (16, 8, 10, 11.0), (40, 4, 10, 8.9)],
)
def test_wide_resnets_are_as_large_as_in_the_paper(
    depth: int, widen: int, classes: int, millions: float
) -> None:
    """Tables 4 and 5 of Zagoruyko and Komodakis."""
    with torch.device("meta"):
        model = WideResNet(depth, widen, classes)
    assert parameters(model) / 1e6 == pytest.approx(millions, abs=0.06)
    assert len([m for m in model.modules() if isinstance(m, nn.Conv2d)]) == depth


@pytest.mark.parametrize(
    ("settings", "millions"),
    [
        ({"name": "torchvision", "arch": "resnet50"}, 25.557),
        ({"name": "torchvision", "arch": "resnet50", "small_images": True, "num_classes": 100}, 23.705),
        ({"name": "vit", "size": "s", "patch": 16}, 22.05),
        ({"name": "vit", "size": "s", "patch": 32}, 22.88),
        ({"name": "vit", "size": "b", "patch": 16}, 86.57),
        ({"name": "vit", "size": "ti", "patch": 16}, 5.72),
        ({"name": "vit", "size": "l", "patch": 16}, 304.33),
    ],
    ids=lambda value: " ".join(map(str, value.values())) if isinstance(value, dict) else None,
)
def test_large_models_are_as_large_as_published(settings: dict[str, Any], millions: float) -> None:
    with torch.device("meta"):  # without memory for the weights
        model = parse(MODELS[settings.pop("name")], settings).build()
    assert parameters(model) / 1e6 == pytest.approx(millions, abs=0.006)


@pytest.mark.parametrize("size", [8, 9, 32])
@pytest.mark.parametrize(
    "build",
    [
        lambda: CIFARResNet(depth=14, num_classes=7, width=4, in_channels=2),
        lambda: WideResNet(depth=10, widen=1, num_classes=7, in_channels=2),
    ],
)
def test_any_image_size(build: Any, size: int) -> None:
    assert build()(torch.randn(3, 2, size, size)).shape == (3, 7)


def test_models_of_torchvision_take_their_images() -> None:
    small = Torchvision("resnet18", num_classes=7, small_images=True).build().module
    features = nn.Sequential(*list(small.children())[:-2])  # without the average and the head
    assert features(torch.randn(2, 3, 32, 32)).shape == (2, 512, 4, 4)
    assert small(torch.randn(2, 3, 32, 32)).shape == (2, 7)
    vit = ViT("ti", patch=8, image_size=32, num_classes=7).build().module
    assert vit(torch.randn(2, 3, 32, 32)).shape == (2, 7)


def test_every_parameter_of_a_vision_transformer_has_a_gradient_from_the_start() -> None:
    """A rule that divides by the curvature needs one, and behind a head of zeros there is none."""
    model = ViT("ti", patch=16, image_size=32, num_classes=7).build().module
    nn.functional.cross_entropy(model(torch.randn(2, 3, 32, 32)), torch.tensor([1, 2])).backward()
    assert [name for name, p in model.named_parameters() if not p.grad.any()] == []


def test_convolutions_begin_as_he_et_al_say() -> None:
    model = WideResNet(depth=10, widen=4, num_classes=10)
    for module in model.modules():
        if isinstance(module, nn.Conv2d) and module.kernel_size == (3, 3):
            expected = (2 / (9 * module.out_channels)) ** 0.5
            assert float(module.weight.std()) == pytest.approx(expected, rel=0.1)


def test_dropout_is_between_the_convolutions_of_a_wide_resnet_while_training() -> None:
    images = torch.randn(4, 3, 8, 8)
    for share, differ in ((0.0, False), (0.3, True)):
        model = WideResNet(depth=10, widen=1, num_classes=10, dropout=share)
        assert (not torch.equal(model(images), model(images))) == differ
        model.eval()
        assert torch.equal(model(images), model(images))


@pytest.mark.parametrize(("depth", "near"), [(9, 8), (18, 20), (2, 8)])
def test_other_depths_are_refused(depth: int, near: int) -> None:
    with pytest.raises(ValueError, match=rf"depth={depth} is not 6n \+ 2; the nearest that is: {near}"):
        CIFARResNet(depth, num_classes=10)


@pytest.mark.parametrize(("depth", "near"), [(9, 10), (27, 28), (4, 10)])
def test_other_depths_of_wide_resnets_are_refused(depth: int, near: int) -> None:
    with pytest.raises(ValueError, match=rf"depth={depth} is not 6n \+ 4; the nearest that is: {near}"):
        WideResNet(depth, 1, num_classes=10)


@pytest.mark.parametrize(
    ("name", "settings", "said"),
    [
        (
            "torchvision",
            {"arch": "resnet51"},
            "arch=resnet51: torchvision has no such classifier; did",
        ),
        (
            "torchvision",
            {"arch": "vgg11", "small_images": True},
            "small_images is for ResNets, not for arch=vgg11",
        ),
        ("vit", {"size": "m"}, "size=m: must be one of ti, s, b, l"),
        ("vit", {"image_size": 100}, "patch=32 does not divide image_size=100"),
        ("wide_resnet", {"dropout": 1.0}, "dropout=1.0: must be in"),
    ],
)
def test_mistakes_are_refused(name: str, settings: dict[str, Any], said: str) -> None:
    with torch.device("meta"), pytest.raises((ConfigError, ValueError), match=said):
        parse(MODELS[name], settings).build()
