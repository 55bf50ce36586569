"""The models a recipe can name. To add one: write a dataclass with `build`, and add a line to `MODELS`."""

from composer_sassha.recipes.models.language import GPT, TextClassifier
from composer_sassha.recipes.models.resnet_cifar import CIFARResNet, ResNetCIFAR
from composer_sassha.recipes.models.vision import Torchvision, ViT
from composer_sassha.recipes.models.wide_resnet import WRN, WideResNet

MODELS: dict[str, type] = {
    "resnet_cifar": ResNetCIFAR,
    "wide_resnet": WRN,
    "vit": ViT,
    "torchvision": Torchvision,
    "text_classifier": TextClassifier,
    "gpt": GPT,
}

__all__ = [
    "GPT",
    "MODELS",
    "WRN",
    "CIFARResNet",
    "ResNetCIFAR",
    "TextClassifier",
    "Torchvision",
    "ViT",
    "WideResNet",
]
