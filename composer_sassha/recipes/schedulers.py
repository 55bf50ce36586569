"""The schedules a recipe can name: Composer's, each with a linear warm-up from zero.

Times are Composer's: 2ep, 100ba (batches), 0.1dur (of the whole training). To add a schedule: write a
dataclass, and add a line to `SCHEDULERS`.
"""

from dataclasses import MISSING, asdict, dataclass

from composer.optim import (
    ComposerScheduler,
    ConstantWithWarmupScheduler,
    CosineAnnealingWithWarmupScheduler,
    LinearWithWarmupScheduler,
    MultiStepWithWarmupScheduler,
)

import composer_sassha
from composer_sassha.recipes.schema import at_least, checked, time_in

_time = time_in("ep", "ba", "sp", "dur", positive=False)


@dataclass
class Constant:
    """The base value throughout."""

    t_warmup: str = checked("0ba", _time)

    def build(self) -> ComposerScheduler:
        """Return Composer's scheduler."""
        return ConstantWithWarmupScheduler(**asdict(self))


@dataclass
class Linear:
    """From `alpha_i` times the base value to `alpha_f` times it, in a straight line that ends at `t_max`."""

    t_warmup: str = checked("0ba", _time)
    alpha_i: float = checked(1.0, at_least(0))
    alpha_f: float = checked(0.0, at_least(0))
    t_max: str = checked("1dur", _time)

    def build(self) -> ComposerScheduler:
        """Return Composer's scheduler."""
        return LinearWithWarmupScheduler(**asdict(self))


@dataclass
class Cosine:
    """From the base value to `alpha_f` times it, along half a cosine that ends at `t_max`."""

    t_warmup: str = checked("0ba", _time)
    alpha_f: float = checked(0.0, at_least(0))
    t_max: str = checked("1dur", _time)

    def build(self) -> ComposerScheduler:
        """Return Composer's scheduler."""
        return CosineAnnealingWithWarmupScheduler(**asdict(self))


@dataclass
class MultiStep:
    """The value is multiplied by `gamma` at each milestone."""

    milestones: tuple[str, ...] = checked(MISSING, _time)
    gamma: float = checked(0.1, at_least(0))
    t_warmup: str = checked("0ba", _time)

    def build(self) -> ComposerScheduler:
        """Return Composer's scheduler."""
        return MultiStepWithWarmupScheduler(**asdict(self))


@dataclass
class FollowLR:
    """`composer_sassha.FollowLR`: moves with the learning rate; for other hyperparameters only."""

    alpha_f: float = checked(0.0, at_least(0))

    def build(self) -> ComposerScheduler:
        """Return Composer's scheduler."""
        return composer_sassha.FollowLR(self.alpha_f)


SCHEDULERS: dict[str, type] = {
    "constant": Constant,
    "linear": Linear,
    "cosine": Cosine,
    "multi_step": MultiStep,
}

# Those that can drive another hyperparameter than the learning rate.
SCHEDULES: dict[str, type] = {**SCHEDULERS, "follow_lr": FollowLR}
