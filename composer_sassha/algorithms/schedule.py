"""Schedules for the hyperparameters of perturbations and update rules."""

import copy
import inspect
from dataclasses import fields
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

from composer.core import Algorithm, Event, State, Time, TimeUnit
from composer.loggers import Logger
from composer.optim import ComposerScheduler
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from composer_sassha.algorithms import checks, wiring
from composer_sassha.common import validate
from composer_sassha.common.rates import fraction_of_largest_rate
from composer_sassha.common.validate import SettingError
from composer_sassha.optim import SharpnessAwareOptimizer
from composer_sassha.optim.counters import COUNTERS
from composer_sassha.perturbations import Perturbation


class Schedule(Algorithm):
    """Drives a hyperparameter by one of Composer's schedulers, as Composer itself drives the learning rate.

    For every batch, the hyperparameter is set to its value at the Trainer's start times the scheduler's
    multiplier. It is a number of the perturbation (`rho`, `alpha`, `beta`, ...). If the perturbation has none
    of that name, it is one of the optimizer's parameter groups (`hessian_power`, `weight_decay`, ...); a
    group that lacks it is left alone, and one that is added later starts from the value that it brings.
    Nothing has to be saved, since a resumed run computes the same values. Composer sets the learning rate
    before it counts a batch, so that the rate is one batch behind its scheduler. The values set here are not
    behind; `FollowLR` uses the present rate. Logs `schedule/<name>`.

    Args:
        name: name of the hyperparameter; not `lr`, which the Trainer's own schedulers drive.
        scheduler: a Composer scheduler, which maps the Trainer's state to a multiplier; `FollowLR` moves with
            the learning rate. `scale_schedule_ratio` does not reach it.

    Raises:
        TypeError, ValueError: an argument that is not allowed; at the Trainer's start, an unknown name; at
            the start of the training, a schedule that would end outside of the hyperparameter's range; during
            the training, one that leaves the range in between.

    Example:
        >>> from composer.optim import LinearScheduler
        >>> Schedule("hessian_power", LinearScheduler(alpha_i=0.5, alpha_f=1.0))
        Schedule('hessian_power', LinearScheduler(alpha_i=0.5, alpha_f=1.0, t_max='1.0dur'))
    """

    def __init__(self, name: str, scheduler: ComposerScheduler) -> None:
        if not isinstance(name, str) or name == "lr":
            raise ValueError(
                f"Schedule: name={name!r} is not allowed; it must be the name of a hyperparameter other than "
                "lr, for which the Trainer has schedulers"
            )
        if not callable(scheduler) or isinstance(scheduler, type):
            raise TypeError(
                f"Schedule: scheduler={scheduler!r} is not allowed; it must be a Composer scheduler, such as "
                "composer.optim.LinearScheduler()"
            )
        self.name = name
        self.scheduler = scheduler
        # The start value of the perturbation, or that of each parameter group, by base optimizer: one
        # algorithm may serve several Trainers.
        self._of_perturbation: WeakKeyDictionary[Optimizer, float] = WeakKeyDictionary()
        self._of_groups: WeakKeyDictionary[Optimizer, list[_GroupStart]] = WeakKeyDictionary()

    def __repr__(self) -> str:
        return f"Schedule({self.name!r}, {_call(self.scheduler)})"

    def match(self, event: Event, state: State) -> bool:
        """Whether to run: at the Trainer's start, and before every batch."""
        return event in (*wiring.START, Event.AFTER_DATALOADER, Event.BATCH_START)

    def apply(self, event: Event, state: State, logger: Logger) -> None:
        """Keep the start value, wrap the optimizer, set the value, or check it."""
        (optimizer,) = state.optimizers
        if event == Event.INIT:
            checks.check(state)
            # Before loading: a checkpoint's value has been multiplied already.
            self._find_start(state)
        elif event == Event.BEFORE_LOAD:
            self._starts(optimizer)  # sharding has made new groups
            wiring.wrapped_optimizer(state)
        elif event == Event.FIT_START:
            wiring.refuse_another_trainers(state)
            wiring.scale_gradients(state)  # fit() may have been given another precision
            self._check_the_end(state)
        elif event == Event.AFTER_DATALOADER:
            self._set(optimizer.perturbation, optimizer.param_groups, self._values(optimizer, state))
        else:
            try:  # only now have all schedules set their values, some of which depend on each other
                _check_range(optimizer, self.name, optimizer.perturbation, optimizer.param_groups)
            except ValueError as error:
                raise SettingError(f"Schedule: at batch {state.timestamp.batch.value}: {error}") from error
            values = [value for value in self._values(optimizer, state) if value is not None]
            logger.log_metrics({f"schedule/{self.name}": value for value in values[:1]})

    def _find_start(self, state: State) -> None:
        if sum(isinstance(a, Schedule) and a.name == self.name for a in state.algorithms) > 1:
            raise ValueError(f"Schedule: {self.name} is scheduled twice; keep one of them")
        own = _schedulable(checks.perturbation_of(state))
        (optimizer,) = state.optimizers
        base, names = _base(optimizer), {n: 0 for g in optimizer.param_groups for n in _group_numbers(g)}
        self._of_perturbation.pop(base, None)
        self._of_groups.pop(base, None)
        if self.name in own:
            self._of_perturbation[base] = own[self.name]
        elif self.name not in names:
            known = [*own, *names]
            raise ValueError(
                f"Schedule: name={self.name!r} is not allowed; it must be a number of the perturbation "
                f"or of the optimizer ({', '.join(known)})"
            )
        self._starts(optimizer)

    def _starts(self, optimizer: Optimizer) -> list[float | None]:
        """Return the start value of the perturbation, or of each group: None for a group that lacks it."""
        base = _base(optimizer)
        if base in self._of_perturbation:
            return [self._of_perturbation[base]]
        known = self._of_groups.get(base, [])

        def start(group: dict[str, Any]) -> float | None:
            # Loading makes new groups with the same lists of parameters, freezing layers the contrary.
            found = (s.value for s in known if s.group is group or s.params is group["params"])
            return next(found, _group_numbers(group).get(self.name))

        groups = optimizer.param_groups
        starts = self._of_groups[base] = [_GroupStart(g, g["params"], start(g)) for g in groups]
        return [s.value for s in starts]

    def _values(self, optimizer: Optimizer, state: State) -> list[float | None]:
        multiplier = self.scheduler(state)
        return [None if start is None else start * multiplier for start in self._starts(optimizer)]

    def _set(
        self, perturbation: Perturbation | None, groups: list[dict[str, Any]], values: list[float | None]
    ) -> None:
        if self.name in _schedulable(perturbation):
            setattr(perturbation, self.name, values[0])
        else:
            for group, value in zip(groups, values, strict=True):
                if value is not None:
                    group[self.name] = value

    def _check_the_end(self, state: State) -> None:
        """Refuse, before the first step, a schedule whose value at the last step is not allowed."""
        (optimizer,) = state.optimizers
        now, last = state.timestamp, _last_batch(state)
        if last is None:
            return
        perturbation = copy.copy(optimizer.perturbation)
        groups = [dict(group) for group in optimizer.param_groups]
        first, lr = optimizer.param_groups[0], optimizer.param_groups[0]["lr"]
        state.timestamp = last
        try:
            for scheduler in state.schedulers:  # FollowLR reads the learning rate
                if isinstance(scheduler, LambdaLR):
                    first["lr"] = scheduler.base_lrs[0] * scheduler.lr_lambdas[0](last.batch.value)
            for other in state.algorithms:
                if isinstance(other, Schedule):
                    other._set(perturbation, groups, other._values(optimizer, state))
            _check_range(optimizer, self.name, perturbation, groups)
        except ValueError as error:
            why = " ".join(str(error).split())
            raise SettingError(
                f"Schedule: {self.name} cannot follow its scheduler to the end: {why}"
            ) from error
        finally:
            state.timestamp, first["lr"] = now, lr


class _GroupStart(NamedTuple):
    """A parameter group, its list of parameters, and its value when it was first seen."""

    group: dict[str, Any]
    params: list[Tensor]
    value: float | None


class FollowLR(ComposerScheduler):
    """A multiplier that moves with the learning rate, from 1 at its largest to `alpha_f` where it is zero.

    The multiplier is `alpha_f + (1 - alpha_f) * lr / lr_max`, with the rates of the first parameter group and
    the quotient clamped to [0, 1]. With alpha_f > 1 it rises while the learning rate falls, as the authors of
    SASSHA do with the power of the Hessian.

    Args:
        alpha_f: the multiplier at a learning rate of zero, >= 0. Default: 0.
        lr_max: the largest learning rate, for a scheduler that starts from a smaller one, as CyclicLR.
            Default: the group's `max_lr` (OneCycleLR sets it) or `initial_lr`.

    Raises:
        TypeError, ValueError: an argument that is not a finite number >= 0.

    Example:
        >>> scheduler = FollowLR(alpha_f=0.25)
    """

    def __init__(self, alpha_f: float = 0.0, lr_max: float | None = None) -> None:
        self.alpha_f = validate.number("FollowLR", "alpha_f", alpha_f, low=0)
        self.lr_max = None if lr_max is None else validate.number("FollowLR", "lr_max", lr_max, low=0)

    def __repr__(self) -> str:
        known = "" if self.lr_max is None else f", lr_max={self.lr_max}"
        return f"FollowLR(alpha_f={self.alpha_f}{known})"

    def __call__(self, state: State, ssr: float = 1.0) -> float:
        """Return the multiplier."""
        part = fraction_of_largest_rate(state.optimizers[0].param_groups[0], lr_max=self.lr_max)
        return self.alpha_f + (1 - self.alpha_f) * part


def _base(optimizer: Optimizer) -> Optimizer:
    return optimizer.base_optimizer if isinstance(optimizer, SharpnessAwareOptimizer) else optimizer


def _last_batch(state: State) -> Any:
    """Return the timestamp of the training's last batch, or None if it is unknown."""
    end, length = state.max_duration, state.dataloader_len
    if end is None or end.unit not in (TimeUnit.EPOCH, TimeUnit.BATCH):
        return None
    if end.unit == TimeUnit.BATCH:
        batches = end.value
    elif length is not None:
        batches = end.value * length.value
    else:
        return None
    epochs = (batches - 1) // length.value if length is not None and length.value else 0
    return state.timestamp.copy(
        epoch=Time(max(epochs, 0), TimeUnit.EPOCH), batch=Time(max(batches - 1, 0), TimeUnit.BATCH)
    )


def _check_range(
    optimizer: SharpnessAwareOptimizer,
    name: str,
    perturbation: Perturbation | None,
    groups: list[dict[str, Any]],
) -> None:
    if perturbation is not None and name in _schedulable(perturbation):
        perturbation.validate()
        return
    for group in groups:
        if hasattr(optimizer, "check_group"):
            optimizer.check_group(group)
        elif name in _group_numbers(group):  # torch's check their arguments only in the constructor
            validate.number(type(optimizer).__name__, name, group[name], low=0)


def _schedulable(perturbation: Perturbation | None) -> dict[str, float]:
    """Return the arguments of a perturbation that can be scheduled."""
    if perturbation is None or not hasattr(perturbation, "__dataclass_fields__"):
        return {}
    every = fields(perturbation)  # type: ignore[arg-type]  # a dataclass
    return {
        f.name: getattr(perturbation, f.name) for f in every if f.type is float and f.init and not f.metadata
    }


def _group_numbers(group: dict[str, Any]) -> dict[str, float]:
    others = ("lr", "initial_lr", "block_size", *COUNTERS)
    return {
        name: value
        for name, value in group.items()
        if isinstance(value, int | float) and not isinstance(value, bool) and name not in others
    }


def _call(scheduler: Any) -> str:
    """Return the call that makes a scheduler, as text, with the arguments that it keeps as attributes."""
    names = inspect.signature(type(scheduler)).parameters
    kept = {name: getattr(scheduler, name) for name in names if hasattr(scheduler, name)}
    plain = {name: v.to_timestring() if isinstance(v, Time) else v for name, v in kept.items()}
    return f"{type(scheduler).__name__}({', '.join(f'{name}={v!r}' for name, v in plain.items())})"
