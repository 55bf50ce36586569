"""torchvision's models: any of its classifiers by name, and vision transformers of any size."""

from dataclasses import dataclass
from typing import NamedTuple

import torchvision
from composer.models import ComposerClassifier, ComposerModel
from torch import nn
from torchvision.models import ResNet, VisionTransformer

from composer_sassha.recipes.errors import did_you_mean
from composer_sassha.recipes.schema import at_least, checked, one_of, within


def _check_arch(arch: str) -> None:
    known = torchvision.models.list_models(module=torchvision.models)
    if arch not in known:
        raise ValueError(f"torchvision has no such classifier{did_you_mean(arch, known)}")


@dataclass
class Torchvision:
    """A classifier of torchvision, not trained yet.

    Args:
        arch: its name in `torchvision.models`, such as resnet50.
        num_classes: number of outputs, >= 2.
        small_images: for images of 32x32 pixels or so, a ResNet begins with a 3x3 convolution of stride 1 and
            no pooling, in place of the 7x7 one of stride 2 and the pooling that are meant for 224x224.
    """

    arch: str = checked("resnet50", _check_arch)
    num_classes: int = checked(1000, at_least(2))
    small_images: bool = False

    def build(self) -> ComposerModel:
        """Return the model."""
        module = torchvision.models.get_model(self.arch, weights=None, num_classes=self.num_classes)
        if self.small_images:
            if not isinstance(module, ResNet):
                raise ValueError(f"small_images is for ResNets, not for arch={self.arch}")
            stem = nn.Conv2d(3, module.conv1.out_channels, 3, padding=1, bias=False)
            nn.init.kaiming_normal_(stem.weight, mode="fan_out", nonlinearity="relu")
            module.conv1, module.maxpool = stem, nn.Identity()
        return ComposerClassifier(module, num_classes=self.num_classes)


class _Size(NamedTuple):
    layers: int
    heads: int
    hidden: int


# Table 1 of Dosovitskiy et al. (2021); Ti and S are from Touvron et al. (2021). The MLP is 4 times as wide.
_SIZES = {
    "ti": _Size(12, 3, 192),
    "s": _Size(12, 6, 384),
    "b": _Size(12, 12, 768),
    "l": _Size(24, 16, 1024),
}


@dataclass
class ViT:
    """torchvision's `VisionTransformer`, with a class token and learned positions; by default ViT-S/32.

    Args:
        size: ti, s, b or l.
        patch: pixels on a side of a patch, >= 1; it divides `image_size`.
        image_size: pixels on a side of an image, >= 1.
        num_classes: number of outputs, >= 2.
        dropout: in [0, 1).
    """

    size: str = checked("s", one_of(*_SIZES))
    patch: int = checked(32, at_least(1))
    image_size: int = checked(224, at_least(1))
    num_classes: int = checked(1000, at_least(2))
    dropout: float = checked(0.0, within(0, 1))

    def build(self) -> ComposerModel:
        """Return the model."""
        if self.image_size % self.patch:
            raise ValueError(f"patch={self.patch} does not divide image_size={self.image_size}")
        layers, heads, hidden = _SIZES[self.size]
        module = VisionTransformer(
            self.image_size,
            self.patch,
            layers,
            heads,
            hidden,
            mlp_dim=4 * hidden,
            dropout=self.dropout,
            num_classes=self.num_classes,
        )
        # torchvision's head begins at zero. Behind it no curvature can be measured until the head has moved,
        # and until then a second-order rule would divide by its eps alone.
        nn.init.trunc_normal_(module.heads.head.weight, std=0.02)
        return ComposerClassifier(module, num_classes=self.num_classes)
