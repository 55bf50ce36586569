"""The optimizers, algorithms and callbacks that a recipe can name.

To add one, name its class in the registry, or write a dataclass with a method `build`.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from composer.algorithms import GradientClipping, LabelSmoothing
from torch.nn import Parameter
from torch.optim import Optimizer

from composer_sassha import algorithms, optim
from composer_sassha.callbacks import SharpnessMonitor
from composer_sassha.recipes.schema import arguments_of, at_least, checked, within


@dataclass
class SGD:
    """`torch.optim.SGD`."""

    lr: float = checked(0.1, at_least(0))
    momentum: float = checked(0.9, within(0, 1))
    weight_decay: float = checked(0.0, at_least(0))
    nesterov: bool = False

    def build(self, params: Iterable[Parameter]) -> Optimizer:
        """Return the optimizer of these parameters."""
        return torch.optim.SGD(params, self.lr, self.momentum, 0.0, self.weight_decay, self.nesterov)


@dataclass
class AdamW:
    """`torch.optim.AdamW`."""

    lr: float = checked(1e-3, at_least(0))
    betas: tuple[float, float] = checked((0.9, 0.999), within(0, 1))
    eps: float = checked(1e-8, at_least(0))
    weight_decay: float = checked(1e-2, at_least(0))

    def build(self, params: Iterable[Parameter]) -> Optimizer:
        """Return the optimizer of these parameters."""
        return torch.optim.AdamW(params, self.lr, self.betas, self.eps, self.weight_decay)


OPTIMIZERS: dict[str, type] = {
    "sgd": SGD,
    "adamw": AdamW,
    # These three need a Hessian: add the algorithm `lazy_hessian`, `sassha` or `msassha`.
    "sassha": arguments_of(optim.SASSHA, without=["params"]),
    "adahessian": arguments_of(optim.AdaHessian, without=["params"]),
    "sophia": arguments_of(optim.Sophia, without=["params"]),
}

ALGORITHMS: dict[str, type] = {
    "sam": arguments_of(algorithms.SAM),
    "asam": arguments_of(algorithms.ASAM),
    "gsam": arguments_of(algorithms.GSAM),
    "ssam": arguments_of(algorithms.SSAM),
    "usam": arguments_of(algorithms.USAM),
    "looksam": arguments_of(algorithms.LookSAM),
    "esam": arguments_of(algorithms.ESAM),
    "msam": arguments_of(algorithms.MSAM),
    "lazy_hessian": arguments_of(algorithms.LazyHessian),
    "sassha": arguments_of(algorithms.Sassha),
    "msassha": arguments_of(algorithms.MSassha),
    # Composer's
    "gradient_clipping": arguments_of(GradientClipping),
    "label_smoothing": arguments_of(LabelSmoothing, without=["target_key"]),
}

CALLBACKS: dict[str, type] = {
    "sharpness_monitor": arguments_of(SharpnessMonitor, without=["dataloader"]),  # on the held-out data
}
