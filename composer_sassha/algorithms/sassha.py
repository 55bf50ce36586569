"""SASSHA and M-SASSHA as Composer algorithms: a perturbation with the lazy Hessian refresh."""

import warnings
from typing import Any

from composer.core import Event, State
from composer.loggers import Logger

from composer_sassha.algorithms.base import MethodAlgorithm
from composer_sassha.algorithms.lazy_hessian import LazyHessian
from composer_sassha.algorithms.msam import MSAM
from composer_sassha.algorithms.perturbing import PerturbingAlgorithm, as_call
from composer_sassha.algorithms.sam import SAM


class _Both(MethodAlgorithm):
    def __init__(self, perturbing: PerturbingAlgorithm, lazy_hessian: LazyHessian) -> None:
        self.parts: tuple[PerturbingAlgorithm, LazyHessian] = (perturbing, lazy_hessian)
        interval, hessian_interval = perturbing.interval, lazy_hessian.curvature.interval
        if hessian_interval % interval:
            warnings.warn(
                f"{type(self).__name__}: hessian_interval={hessian_interval} is no multiple of interval="
                f"{interval}; some refreshes are at unperturbed weights",
                stacklevel=3,
            )

    def settings(self) -> dict[str, Any]:
        """Return the arguments of the constructor, for `repr`."""
        perturbing, lazy_hessian = self.parts
        own, curvature = perturbing.settings(), lazy_hessian.curvature
        return {
            "rho": own["rho"],
            "interval": own["interval"],
            "hessian_interval": curvature.interval,
            "samples": curvature.samples,
            "seed": curvature.seed,
            "estimator": curvature.estimator,
            "batch_fraction": curvature.batch_fraction,
            "floor": curvature.floor,
            **{name: value for name, value in own.items() if name in ("sync_ascent", "ascent_fraction")},
        }

    def __repr__(self) -> str:
        return as_call(self, self.settings())

    def match(self, event: Event, state: State) -> bool:
        """Whether any of the parts runs."""
        return any(part.match(event, state) for part in self.parts)

    def apply(self, event: Event, state: State, logger: Logger) -> None:
        """Run the parts that match."""
        for part in self.parts:
            if part.match(event, state):
                part.apply(event, state, logger)


class Sassha(_Both):
    """Perturbs as SAM does, and refreshes the Hessian there (SASSHA, Shin et al. 2025, arXiv 2502.18153).

    Needs the optimizer `composer_sassha.SASSHA`, or another one that takes curvature. It is `SAM(rho,
    interval)` and `LazyHessian(hessian_interval)` in one, and logs the metrics of both.

    Args:
        rho: radius of the perturbation, >= 0. Default: 0.2.
        interval: steps between perturbed steps, >= 1. Default: 1.
        hessian_interval: steps between Hessian refreshes, >= 1. Default: 10.
        samples: probes per microbatch, >= 1. Default: 1.
        seed: determines the probes, >= 0. Default: 0.
        sync_ascent: average the ascent gradient over the ranks. Default: False.
        estimator: of the Hessian, see `LazyHessian`. Default: 'hutchinson'.
        batch_fraction: the fraction of the batch to estimate on, in (0, 1]. Default: 1.
        ascent_fraction: the fraction of each microbatch that gives the gradient at w, see `SAM`. Default: 1.
        floor: the smallest magnitude of the estimate, see `LazyHessian`. Default: 0.

    Raises:
        TypeError, ValueError: an argument that is not allowed; at the Trainer's start, a combination that is
            not.

    Example:
        >>> Sassha(rho=0.1)
        Sassha(rho=0.1, interval=1, hessian_interval=10, samples=1, seed=0, sync_ascent=False,
               estimator='hutchinson', batch_fraction=1.0, ascent_fraction=1.0, floor=0.0)
    """

    def __init__(
        self,
        rho: float = 0.2,
        interval: int = 1,
        hessian_interval: int = 10,
        samples: int = 1,
        seed: int = 0,
        sync_ascent: bool = False,
        estimator: str = "hutchinson",
        batch_fraction: float = 1.0,
        ascent_fraction: float = 1.0,
        floor: float = 0.0,
    ) -> None:
        super().__init__(
            SAM(rho, interval, sync_ascent, ascent_fraction=ascent_fraction),
            LazyHessian(hessian_interval, estimator, samples, seed, batch_fraction, floor),
        )

    @classmethod
    def lean(cls, rho: float = 0.2, **others: Any) -> "Sassha":
        """Return a cheaper SASSHA, which perturbs along a fifth of the batch and refreshes half as often.

        A quarter of the batch leaves the curvature of many weights at exactly zero, where the published rule
        divides by `eps` alone. The preset's `floor` prevents that.

        Args:
            rho: radius of the perturbation, >= 0. Default: 0.2.
            **others: arguments of the constructor, which override the preset.

        Raises:
            TypeError, ValueError: as the constructor does.

        Example:
            >>> Sassha.lean()
            Sassha(rho=0.2, interval=1, hessian_interval=20, samples=1, seed=0, sync_ascent=False,
                   estimator='hutchinson', batch_fraction=0.25, ascent_fraction=0.2, floor=0.01)
        """
        preset = {"hessian_interval": 20, "batch_fraction": 0.25, "ascent_fraction": 0.2, "floor": 0.01}
        return cls(rho, **preset | others)


class MSassha(_Both):
    """Perturbs along the momentum, and refreshes the Hessian there (M-SASSHA, Shin et al. 2025).

    SASSHA at the cost of one pass a step. Needs the optimizer `composer_sassha.SASSHA`, or another one that
    takes curvature and keeps a momentum. It is `MSAM(rho, interval)` and `LazyHessian(hessian_interval)` in
    one, and logs the metrics of both.

    Args:
        rho: length of the displacement, >= 0. Default: 0.6.
        interval: steps between perturbed steps, >= 1. Default: 1.
        hessian_interval: steps between Hessian refreshes, >= 1. Default: 10.
        samples: probes per microbatch, >= 1. Default: 1.
        seed: determines the probes, >= 0. Default: 0.
        estimator: of the Hessian, see `LazyHessian`. Default: 'hutchinson'.
        batch_fraction: the fraction of the batch to estimate on, in (0, 1]. Default: 1.
        floor: the smallest magnitude of the estimate, see `LazyHessian`. Default: 0.

    Raises:
        TypeError, ValueError: an argument that is not allowed; at the Trainer's start, a combination that is
            not.

    Example:
        >>> MSassha(rho=0.3)
        MSassha(rho=0.3, interval=1, hessian_interval=10, samples=1, seed=0,
                estimator='hutchinson', batch_fraction=1.0, floor=0.0)
    """

    def __init__(
        self,
        rho: float = 0.6,
        interval: int = 1,
        hessian_interval: int = 10,
        samples: int = 1,
        seed: int = 0,
        estimator: str = "hutchinson",
        batch_fraction: float = 1.0,
        floor: float = 0.0,
    ) -> None:
        super().__init__(
            MSAM(rho, interval),
            LazyHessian(hessian_interval, estimator, samples, seed, batch_fraction, floor),
        )
