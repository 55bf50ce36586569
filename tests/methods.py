"""The table that feeds the general tests: a new method is tested by adding a row."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from composer.core import Algorithm
from torch.optim import Optimizer

from composer_sassha import SAM, SASSHA, LazyHessian, Sassha


@dataclass(frozen=True)
class Method:
    """How to build a method; `second_order` counts the refreshes of its first four steps."""

    name: str
    optimizer: Callable[[Any], Optimizer]
    algorithms: Callable[[], list[Algorithm]]
    second_order: int = 0

    def __str__(self) -> str:
        return self.name


def sgd(params: Any) -> Optimizer:
    return torch.optim.SGD(params, lr=0.05, momentum=0.9, weight_decay=1e-3)


def adamw(params: Any) -> Optimizer:
    return torch.optim.AdamW(params, lr=0.01)


def sassha(params: Any) -> Optimizer:
    return SASSHA(params, lr=0.05, weight_decay=1e-2)


METHODS = [
    Method("sam_sgd", sgd, lambda: [SAM(rho=0.1)]),
    Method("sam_sgd_every_2", sgd, lambda: [SAM(rho=0.1, interval=2)]),
    Method("sam_adamw", adamw, lambda: [SAM(rho=0.1)]),
    Method("lazy_hessian", sassha, lambda: [LazyHessian(interval=3)], second_order=2),
    Method("sassha", sassha, lambda: [Sassha(rho=0.1, hessian_interval=3)], second_order=2),
    Method(
        "sassha_every_2",
        sassha,
        lambda: [Sassha(0.1, interval=2, hessian_interval=2, samples=2)],
        second_order=2,
    ),
]
