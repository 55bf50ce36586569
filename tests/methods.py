"""The table that feeds the general tests: a new method is tested by adding a row.

`METHODS` has every row. `DEFAULT` has those that run by default; the other cells of the grid are `slow`.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from composer.core import Algorithm
from composer.optim import CosineAnnealingScheduler, LinearScheduler
from torch.optim import Optimizer

from composer_sassha import (
    ASAM,
    ESAM,
    GSAM,
    MSAM,
    SAM,
    SASSHA,
    SSAM,
    USAM,
    AdaHessian,
    FollowLR,
    LazyHessian,
    LookSAM,
    MSassha,
    Sassha,
    Schedule,
    Sophia,
)


@dataclass(frozen=True)
class Method:
    """How to build a method, the passes of its perturbed steps, the second derivatives of its first four."""

    name: str
    optimizer: Callable[[Any], Optimizer]
    algorithms: Callable[[], list[Algorithm]]
    passes: int = 2
    second_order: int = 0

    def __str__(self) -> str:
        return self.name


def sgd(params: Any) -> Optimizer:
    return torch.optim.SGD(params, lr=0.05, momentum=0.9, weight_decay=1e-3)


def adamw(params: Any) -> Optimizer:
    return torch.optim.AdamW(params, lr=0.01)


def sassha(params: Any) -> Optimizer:
    return SASSHA(params, lr=0.05, weight_decay=1e-2)


def adahessian(params: Any) -> Optimizer:
    return AdaHessian(params, lr=0.05, eps=1e-2, weight_decay=1e-2, block_size=2)


def sophia(params: Any) -> Optimizer:
    return Sophia(params, lr=0.01, weight_decay=1e-2, clip_threshold=0.1)


RULES: dict[str, Callable[[Any], Optimizer]] = {
    "sgd": sgd,
    "adamw": adamw,
    "sassha": sassha,
    "adahessian": adahessian,
    "sophia": sophia,
}
SECOND_ORDER = ("sassha", "adahessian", "sophia")

PERTURBATIONS: dict[str, Callable[[], list[Algorithm]]] = {
    "none": list,
    "sam": lambda: [SAM(rho=0.1)],
    "asam": lambda: [ASAM(rho=0.3)],
    "gsam": lambda: [GSAM(rho_max=0.1, rho_min=0.05, alpha=0.2)],
    "ssam": lambda: [SSAM(rho=0.1)],
    "usam": lambda: [USAM(rho=0.1, renormalize=True)],
    "looksam": lambda: [LookSAM(rho=0.1, alpha=0.5, interval=2)],
    "esam": lambda: [ESAM(rho=0.1, beta=0.5, gamma=0.6)],
    "msam": lambda: [MSAM(rho=0.1)],
}
ONE_PASS = ("none", "msam")


def combination(perturbation: str, rule: str) -> Method:
    """One cell of the grid."""
    curved = rule in SECOND_ORDER

    def algorithms() -> list[Algorithm]:
        return [*PERTURBATIONS[perturbation](), *([LazyHessian(interval=3)] if curved else [])]

    passes = 1 if perturbation in ONE_PASS else 2
    return Method(f"{perturbation}_{rule}", RULES[rule], algorithms, passes, second_order=2 if curved else 0)


# What the grid does not say: intervals, the methods in one, estimators, schedules.
MORE = [
    Method("sam_inf_sgd", sgd, lambda: [SAM(rho=0.01, p=float("inf"))]),
    Method("sam_sgd_every_2", sgd, lambda: [SAM(rho=0.1, interval=2)]),
    Method("usam_plain_sgd", sgd, lambda: [USAM(rho=0.1)]),
    Method("sassha", sassha, lambda: [Sassha(rho=0.1, hessian_interval=3)], second_order=2),
    Method(
        "sassha_every_2",
        sassha,
        lambda: [Sassha(0.1, interval=2, hessian_interval=2, samples=2)],
        second_order=2,
    ),
    Method(
        "sassha_partial_ascent",
        sassha,
        lambda: [Sassha(rho=0.1, hessian_interval=3, ascent_fraction=0.4)],
        second_order=2,
    ),
    Method("msassha", sassha, lambda: [MSassha(rho=0.1, hessian_interval=3)], passes=1, second_order=2),
    Method(
        "sophia_gauss_newton", sophia, lambda: [LazyHessian(3, estimator="gauss_newton", samples=2)], passes=1
    ),
    Method("sassha_fisher", sassha, lambda: [SAM(0.1), LazyHessian(3, estimator="empirical_fisher")]),
    Method("sassha_difference", sassha, lambda: [SAM(0.1), LazyHessian(3, estimator="finite_difference")]),
    Method(
        "sassha_on_part",
        sassha,
        lambda: [SAM(0.1), LazyHessian(3, batch_fraction=0.4)],
        second_order=2,
    ),
    Method(
        "sassha_scheduled",
        sassha,
        lambda: [
            Sassha(rho=0.1, hessian_interval=3),
            Schedule("rho", CosineAnnealingScheduler(alpha_f=0.1)),
            Schedule("hessian_power", LinearScheduler(alpha_i=0.5, alpha_f=1.0)),
        ],
        second_order=2,
    ),
    Method("sam_follows_lr", sgd, lambda: [SAM(rho=0.1), Schedule("rho", FollowLR(alpha_f=0.5))]),
]
# Plain SGD and AdamW are none of ours.
METHODS = [
    combination(perturbation, rule)
    for perturbation in PERTURBATIONS
    for rule in RULES
    if perturbation != "none" or rule in SECOND_ORDER
] + MORE
NAMED = {method.name: method for method in METHODS}

# A perturbation touches an update rule only through its state: MSAM reads it and LookSAM writes into it. So
# those two run by default under every rule, and the others under SGD and in these cells.
MIXED = ("gsam_adamw", "esam_sassha")


def by_default(method: Method) -> bool:
    """Whether the general tests run a method without `-m slow`."""
    perturbation, _, rule = method.name.partition("_")
    every_rule = perturbation in ("none", "msam", "looksam")
    return method in MORE or method.name in MIXED or every_rule or rule == "sgd"


DEFAULT = [method for method in METHODS if by_default(method)]


def rows(methods: Iterable[Method]) -> list[Any]:
    """Return a parameter per method, marked slow where it does not run by default."""
    return [pytest.param(m, id=m.name, marks=[] if by_default(m) else pytest.mark.slow) for m in methods]


each_method = pytest.mark.parametrize("method", rows(METHODS))
