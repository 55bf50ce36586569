"""The models a recipe can name. To add one: write a dataclass with `build`, and add a line to `MODELS`."""

from composer_sassha.recipes.models.resnet_cifar import CIFARResNet, ResNetCIFAR
from composer_sassha.recipes.models.vision import Torchvision, ViT
from composer_sassha.recipes.models.wide_resnet import WRN, WideResNet

MODELS: dict[str, type] = {
    "resnet_cifar": ResNetCIFAR,
    "wide_resnet": WRN,
    "vit": ViT,
    "torchvision": Torchvision,
}

__all__ = ["MODELS", "WRN", "CIFARResNet", "ResNetCIFAR", "Torchvision", "ViT", "WideResNet"]
