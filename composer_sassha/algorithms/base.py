"""The base class of this package's algorithms, with the attributes that the checks read."""

from collections.abc import Iterable, Iterator
from typing import ClassVar

from composer.core import Algorithm

from composer_sassha.curvature import LazyCurvature
from composer_sassha.perturbations import Perturbation


class MethodAlgorithm(Algorithm):
    """An algorithm that perturbs the weights, refreshes the Hessian, or is made of such algorithms.

    The checks at the Trainer's start and the benchmark read these attributes. An algorithm overrides those
    that apply to it.

    Attributes:
        perturbation: how the weights are displaced; None: they are not.
        curvature: when and how the Hessian's diagonal is estimated; None: it is not.
        ascent_fraction: the fraction of each microbatch that gives the gradient at w, in (0, 1].
        parts: the algorithms that a compound one runs in its place; empty for all others.
        runs_late: the Trainer runs algorithms in ascending order of this number, 0 for Composer's own.
    """

    perturbation: Perturbation | None = None
    curvature: LazyCurvature | None = None
    ascent_fraction: float = 1.0
    parts: "tuple[MethodAlgorithm, ...]" = ()
    runs_late: ClassVar[int] = 0


def taken_apart(algorithms: Iterable[Algorithm]) -> Iterator[Algorithm]:
    """Yield every algorithm, Composer's own included, with compound ones replaced by their parts."""
    for algorithm in algorithms:
        if isinstance(algorithm, MethodAlgorithm) and algorithm.parts:
            yield from taken_apart(algorithm.parts)
        else:
            yield algorithm


def methods_of(algorithms: Iterable[Algorithm]) -> list[MethodAlgorithm]:
    """Return the algorithms of this package among others, compound ones replaced by their parts."""
    return [part for part in taken_apart(algorithms) if isinstance(part, MethodAlgorithm)]
