"""SASSHA as one algorithm: SAM's perturbation and the lazy Hessian refresh."""

from composer.core import Algorithm, Event, State
from composer.loggers import Logger

from composer_sassha.algorithms.lazy_hessian import LazyHessian
from composer_sassha.algorithms.sam import SAM


class Sassha(Algorithm):
    """Perturbs as SAM does, and refreshes the Hessian there (SASSHA, Shin et al. 2025, arXiv 2502.18153).

    Goes with the optimizer `composer_sassha.SASSHA`, or another one that takes curvature. It is `SAM(rho,
    interval)` and `LazyHessian(hessian_interval)` in one, and logs what they log.

    Args:
        rho: radius of the perturbation, >= 0. Default: 0.2.
        interval: steps between perturbed steps, >= 1. Default: 1.
        hessian_interval: steps between Hessian refreshes, >= 1. Default: 10.
        samples: probes per microbatch, >= 1. Default: 1.
        seed: of the probes, >= 0. Default: 0.
        sync_ascent: average the ascent gradient over the ranks. Default: False.

    Raises:
        TypeError, ValueError: an argument that is not allowed; at the Trainer's start, a combination that is
            not.

    Example:
        >>> Sassha(rho=0.1)
        Sassha(rho=0.1, interval=1, hessian_interval=10, samples=1, seed=0, sync_ascent=False)
    """

    def __init__(
        self,
        rho: float = 0.2,
        interval: int = 1,
        hessian_interval: int = 10,
        samples: int = 1,
        seed: int = 0,
        sync_ascent: bool = False,
    ) -> None:
        self.sam = SAM(rho, interval, sync_ascent)
        self.lazy_hessian = LazyHessian(hessian_interval, samples=samples, seed=seed)
        self.parts = (self.sam, self.lazy_hessian)

    def __repr__(self) -> str:
        sam, curvature = self.sam, self.lazy_hessian.curvature
        return (
            f"Sassha(rho={sam.perturbation.rho}, interval={sam.interval}, "
            f"hessian_interval={curvature.interval}, samples={curvature.samples}, seed={curvature.seed}, "
            f"sync_ascent={sam.sync_ascent})"
        )

    def match(self, event: Event, state: State) -> bool:
        """Run whenever one of its parts does."""
        return any(part.match(event, state) for part in self.parts)

    def apply(self, event: Event, state: State, logger: Logger) -> None:
        """Run the parts."""
        for part in self.parts:
            if part.match(event, state):
                part.apply(event, state, logger)
