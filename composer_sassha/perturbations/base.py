"""A perturbation is a program of passes: where the gradient is taken, and what is made of it.

A pass is one forward and backward over the batch. A program yields its passes in order, receives the gradient
of each, and returns the update; None stands for the gradient of its last pass:

    def step(self, at):                      # SAM
        g = yield Ascent()                   # the gradient at w, which only says where to go
        yield Descent(at.towards(g, rho))    # the one at w + e, e = rho g / ||g||, which is the update
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Iterable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.optim import Optimizer

from composer_sassha.common.sharding import local
from composer_sassha.common.tensors import add_scaled_, flatten, global_norm


@dataclass
class Displacement:
    """The displacement `e = scale * direction` of some parameters, for one pass.

    Args:
        params: the displaced parameters; of sharded ones the whole `DTensor`.
        direction: a tensor for each, in the shape of this rank's part.
        scale: 0 displaces by nothing, even along a direction that is not finite. A tensor is not read back.
        spare: applying a scale that is a tensor may overwrite the direction, which saves memory.
    """

    params: Sequence[Tensor]
    direction: Sequence[Tensor]
    scale: float | Tensor = 1.0
    spare: bool = False

    def apply(self) -> None:
        """Move the parameters to w + e, in place."""
        if isinstance(self.scale, Tensor):
            add_scaled_(local(self.params), self.direction, self.scale, spare=self.spare)
        elif self.scale and self.params:
            torch._foreach_add_(local(self.params), list(self.direction), alpha=self.scale)


class Gradient:
    """The gradient that a pass left in the parameters.

    Args:
        params: the parameters that have one; of sharded ones the whole `DTensor`.
        tensors: the gradients. Default: the parameters' `grad`.
        everyone: all parameters that the update is made for. Default: `params`.
        shards: the ranks that hold the other parts of sharded parameters; None: there are none.

    Attributes:
        tensors: the gradient of each parameter, which a program may overwrite. The next pass takes their
            memory.
        flat: a copy in one vector over `everyone`, as the papers write it, in at least float32; a parameter
            without a gradient counts as zero. An `Ascent(keeps=True)` keeps it beyond the next pass.
    """

    def __init__(
        self,
        params: Sequence[Tensor],
        tensors: Sequence[Tensor] | None = None,
        everyone: Sequence[Tensor] | None = None,
        shards: ProcessGroup | None = None,
    ) -> None:
        self.params, self.shards = list(params), shards
        self.tensors: list[Tensor] = local((p.grad for p in self.params) if tensors is None else tensors)
        self._everyone = self.params if everyone is None else everyone

    @cached_property
    def flat(self) -> Tensor:
        """Return a copy in one vector; see the class."""
        if len(self.tensors) != len(self.params):
            raise RuntimeError(
                "this gradient is gone with the next pass; yield Ascent(keeps=True) to keep it"
            )
        found = dict(zip(self.params, self.tensors, strict=True))
        return flatten([found.get(p) for p in self._everyone], like=local(self._everyone))

    def norm(self) -> Tensor:
        """Return the Euclidean norm over all parameters together, accumulated in at least float32.

        A tensor with one entry: reading it back would make a device wait for the host.
        """
        return global_norm(self.tensors, self.shards)

    def keep(self) -> None:
        """Copy the gradient, before the next pass takes its memory."""
        _ = self.flat

    def release(self) -> None:
        """Drop the parameters' own tensors, whose memory the next pass needs."""
        self.tensors = []


@dataclass(frozen=True)
class Ascent:
    """A pass whose gradient says where to go.

    Args:
        e: where it is taken. Default: at w.
        keeps: the gradient is also a part of the update; see `Gradient.flat`. Default: False.
    """

    e: Displacement | None = None
    keeps: bool = False


@dataclass(frozen=True)
class Descent:
    """The pass whose gradient the update is made of, and where the Hessian is estimated when that is due.

    Args:
        e: where it is taken. Default: at w.
    """

    e: Displacement | None = None


Pass = Ascent | Descent
Program = Generator[Pass, Gradient, Tensor | None]


@dataclass
class Point:
    """The weights w of one step, and what a program can know about them.

    Args:
        params: the parameters that the optimizer trains; of sharded ones the whole `DTensor`.
        name_of: the name of a parameter, as `named_parameters` has it; None: it is not known.
        states: what the base optimizer keeps for each parameter, momentum for instance; of sharded ones
            this rank's part.
        group: the base optimizer's first parameter group, for the learning rate.
        step: the number of steps taken; with `rank` it seeds what is drawn at random.
        rank: among those that share the gradient; of sharded weights, the number of its part.
        shards: the ranks that hold the other parts of sharded weights; None: the weights are whole.
        memory: flat vectors that the optimizer's state keeps from step to step, by name (see
            `Perturbation.remembers`); zero before anything was stored.
        metrics: what to log about the step; tensors with one entry are read when they are logged.
    """

    params: Sequence[Tensor] = ()
    name_of: Callable[[Tensor], str | None] = lambda p: None
    states: Sequence[Mapping[str, Any]] = ()
    group: Mapping[str, Any] = field(default_factory=dict)
    step: int = 0
    rank: int = 0
    shards: ProcessGroup | None = None
    memory: MutableMapping[str, Tensor] = field(default_factory=dict)
    metrics: dict[str, Any] = field(default_factory=dict)

    def towards(self, g: Gradient, rho: float) -> Displacement:
        """Return `e = rho * g / ||g||`, one norm over all parameters, and log both."""
        norm = g.norm()
        self.metrics |= {"rho": rho, "grad_norm": norm}
        return Displacement(g.params, g.tensors, ratio(rho, norm, g.params), spare=True)


class Perturbation(ABC):
    """Where the gradient of a step is taken, and what is made of it: a program of passes."""

    # Whether a step has an ascent, and with it more than one pass.
    ascends: ClassVar[bool] = True
    # Whether the update mixes the gradients of several passes. Each rank then makes it of its own gradients,
    # and the result is averaged. A program that returns an update after an ascent must say so.
    mixes: bool = False
    # The name under which the optimizer's state keeps `Point.memory`'s vector; "": there is none.
    remembers: ClassVar[str] = ""

    def __post_init__(self) -> None:
        """Check the arguments; dataclasses call this."""
        self.validate()

    def validate(self) -> None:
        """Raise TypeError or ValueError, with a message of one line, for an argument that is not allowed."""
        return

    @abstractmethod
    def step(self, at: Point) -> Program:
        """Yield the passes of a perturbed step, and return the flat update, or None.

        The wrapper puts w back after every pass. A norm that is zero or not finite displaces by nothing, and
        so does one so small that the parameters' dtype cannot hold rho over it.
        """

    def between(self, at: Point) -> Program:
        """Return the program of a step on which no perturbation is due."""
        del at
        return unperturbed()

    def metrics(self, loss_gap: Any) -> dict[str, Any]:
        """Return the metrics to log after the descent, given the loss at w + e minus the loss at w."""
        return {"loss_gap": loss_gap}

    def check(self, optimizer: Optimizer) -> None:
        """Raise ValueError, with a message of one line, if this perturbation cannot work with `optimizer`."""
        return


def unperturbed() -> Program:
    """Yield the one pass of a step without a perturbation."""
    yield Descent()
    return None


def ratio(rho: float, norm: Tensor, params: Iterable[Tensor]) -> Tensor:
    """Return rho / norm, or 0 if the quotient cannot scale a displacement of `params`.

    Example:
        >>> norms = torch.tensor([2.0, 0.0, math.inf, math.nan])
        >>> ratio(0.5, norms, [torch.zeros(1)]).tolist()
        [0.25, 0.0, 0.0, 0.0]
    """
    if norm.is_cpu:  # some devices have no float64
        norm = norm.double()
    scale = torch.full_like(norm, rho) / norm  # not rho / norm, which torch rounds twice
    largest = min((torch.finfo(p.dtype).max for p in params), default=math.inf)
    return torch.where(scale <= largest, scale, 0.0)  # neither infinity nor NaN is below it


def guarded(rho: float, norm: Tensor) -> Tensor:
    """Return rho, or 0 if the norm is 0 or not finite.

    Example:
        >>> guarded(0.5, torch.tensor([2.0, 0.0, math.inf, math.nan])).tolist()
        [0.5, 0.0, 0.0, 0.0]
    """
    return torch.where((norm > 0) & (norm < math.inf), torch.full_like(norm, rho), 0.0)


def displacement(perturbation: Perturbation, at: Point, g: Gradient) -> Displacement | None:
    """Return the e of a method that ascends once, given the gradient at w.

    Example:
        >>> from composer_sassha.perturbations import SAMPerturbation
        >>> w = torch.zeros(2)
        >>> e = displacement(SAMPerturbation(0.5), Point([w]), Gradient([w], [torch.tensor([3.0, 4.0])]))
        >>> e.apply()
        >>> w
        tensor([0.3000, 0.4000])
    """
    program = perturbation.step(at)
    next(program)
    return program.send(g).e
