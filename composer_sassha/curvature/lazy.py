"""The lazy refresh: when and how a Hessian diagonal is estimated."""

from dataclasses import dataclass

from composer_sassha.common import validate
from composer_sassha.curvature.estimators import ESTIMATORS, Estimator


@dataclass(frozen=True)
class LazyCurvature:
    """When and how `SharpnessAwareOptimizer` estimates the Hessian's diagonal; see `Estimation`.

    Args:
        interval: steps between refreshes, >= 1. Default: 10.
        estimator: its name; allowed: 'hutchinson' (the Hessian, by a second derivative), 'gauss_newton' (its
            positive part, for a softmax and cross-entropy), 'empirical_fisher' (squared gradients: not the
            Hessian), 'finite_difference' (the Hessian of a smooth network, by a second forward and backward).
            Default: 'hutchinson'.
        samples: probes, or draws of labels, per microbatch, >= 1; the cost grows with them, the variance
            falls. 'empirical_fisher' draws nothing and allows 1 only. Default: 1.
        seed: of the draws; with the step, the rank and the microbatch it determines them. Default: 0.
        batch_fraction: the share of each rank's batch, its first samples, to estimate on, in (0, 1].
            Default: 1.
        floor: the smallest magnitude that an entry of the estimate may have, as a fraction of the mean
            magnitude in its tensor (of all entries where the tensor's is 0), in [0, 1]. Above 0 it keeps
            update rules from dividing by a curvature of exactly zero. Default: 0, as published.

    Raises:
        TypeError, ValueError: an argument that is not allowed.

    Example:
        >>> LazyCurvature(interval=5).due(step=6, last_refresh=0)
        True
    """

    interval: int = 10
    estimator: str = "hutchinson"
    samples: int = 1
    seed: int = 0
    batch_fraction: float = 1.0
    floor: float = 0.0

    def __post_init__(self) -> None:
        """Check the arguments."""
        validate.integer("LazyHessian", "interval", self.interval, low=1)
        validate.integer("LazyHessian", "samples", self.samples, low=1)
        validate.integer("LazyHessian", "seed", self.seed, low=0)
        validate.fraction("LazyHessian", "batch_fraction", self.batch_fraction)
        validate.number("LazyHessian", "floor", self.floor, low=0, high=1)
        if self.estimator not in list(ESTIMATORS):
            raise ValueError(
                f"LazyHessian: estimator={self.estimator!r} is not allowed; allowed: {', '.join(ESTIMATORS)}"
            )
        if self.samples > 1 and not self.needs.draws:
            raise ValueError(
                f"LazyHessian: samples={self.samples} is not allowed; it must be 1 with "
                f"estimator={self.estimator!r}, which draws nothing"
            )

    @property
    def needs(self) -> Estimator:
        """The estimator, with what it needs."""
        return ESTIMATORS[self.estimator]

    @property
    def evaluates_again(self) -> bool:
        """Whether some microbatches are evaluated a second time, so that `attach` needs `again`."""
        return self.needs.evaluates_again or self.batch_fraction < 1

    @property
    def whole_only(self) -> str:
        """Why the settings are not for sharded parameters, of which each rank holds a part; "": they are."""
        if not self.needs.sharded:
            return (
                f"LazyHessian: estimator={self.estimator!r} is not allowed with sharded parameters (FSDP), "
                "whose gradients come out of an ordinary backward alone; use estimator='gauss_newton', or "
                "'finite_difference' for a smooth network"
            )
        if self.batch_fraction < 1:
            return (
                f"LazyHessian: batch_fraction={self.batch_fraction} is not allowed with sharded parameters "
                "(FSDP); it must be 1"
            )
        return ""

    def due(self, step: int, last_refresh: int) -> bool:
        """Whether a refresh is due: at multiples of the interval, until one has succeeded."""
        return last_refresh < step - step % self.interval
