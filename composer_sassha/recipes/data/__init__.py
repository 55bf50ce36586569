"""The data sets a recipe can name. To add one: write a dataclass with `build`, and add a line to `DATASETS`.

`build` returns what the Trainer needs: a loader for training, and an `Evaluator` named after the held-out
part, which may name its metrics. What follows from the data for the model, `model_settings` returns, where
there is something.
"""

from composer_sassha.recipes.data.digits import Digits
from composer_sassha.recipes.data.folders import ImageFolder, ImageNet
from composer_sassha.recipes.data.glue import GLUE
from composer_sassha.recipes.data.text import Text
from composer_sassha.recipes.data.torchvision_sets import CIFAR10, CIFAR100, MNIST, SVHN, FashionMNIST

DATASETS: dict[str, type] = {
    "digits": Digits,
    "cifar10": CIFAR10,
    "cifar100": CIFAR100,
    "mnist": MNIST,
    "fashion_mnist": FashionMNIST,
    "svhn": SVHN,
    "image_folder": ImageFolder,
    "imagenet": ImageNet,
    "glue": GLUE,
    "text": Text,
}

__all__ = [
    "CIFAR10",
    "CIFAR100",
    "DATASETS",
    "GLUE",
    "MNIST",
    "SVHN",
    "Digits",
    "FashionMNIST",
    "ImageFolder",
    "ImageNet",
    "Text",
]
