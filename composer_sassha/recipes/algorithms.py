"""The algorithms a recipe can name. To add one: write a dataclass, and add a line to `ALGORITHMS`."""

from dataclasses import asdict, dataclass

from composer import Algorithm

import composer_sassha
from composer_sassha.recipes.schema import at_least, checked


@dataclass
class SAM:
    """`composer_sassha.SAM`: the gradient is taken at the point of highest loss within `rho`."""

    rho: float = checked(0.05, at_least(0))
    interval: int = checked(1, at_least(1))
    sync_ascent: bool = False

    def build(self) -> Algorithm:
        return composer_sassha.SAM(**asdict(self))


@dataclass
class LazyHessian:
    """`composer_sassha.LazyHessian`: an estimate of the Hessian's diagonal every `interval` steps."""

    interval: int = checked(10, at_least(1))
    estimator: str = "hutchinson"
    samples: int = checked(1, at_least(1))
    seed: int = checked(0, at_least(0))

    def build(self) -> Algorithm:
        return composer_sassha.LazyHessian(**asdict(self))


@dataclass
class Sassha:
    """`composer_sassha.Sassha`: SAM and LazyHessian in one."""

    rho: float = checked(0.2, at_least(0))
    interval: int = checked(1, at_least(1))
    hessian_interval: int = checked(10, at_least(1))
    samples: int = checked(1, at_least(1))
    seed: int = checked(0, at_least(0))
    sync_ascent: bool = False

    def build(self) -> Algorithm:
        return composer_sassha.Sassha(**asdict(self))


ALGORITHMS: dict[str, type] = {"sam": SAM, "lazy_hessian": LazyHessian, "sassha": Sassha}
