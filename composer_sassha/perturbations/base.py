"""The base class of perturbations, and the point in weight space that they displace."""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.optim import Optimizer


@dataclass(frozen=True)
class Point:
    """The weights at one step, with what a perturbation may use to displace them.

    Args:
        params: the weights to displace.
        grads: their gradients at w; empty for a perturbation whose `ascends` is False.
        names: their names, as `named_parameters` returns them; empty unless the perturbation sets `names`.
        states: the base optimizer's state of each, with its momentum for instance.
        group: the base optimizer's first parameter group, for the learning rate.
        step: the number of steps taken; with `rank` it seeds random draws.
        rank: of this process; of sharded weights, the number of its part.
        shards: the ranks that hold the other parts of sharded weights; `params`, `grads` and `states` are
            then those of this rank's part. None: the weights are whole.
    """

    params: Sequence[Tensor]
    grads: Sequence[Tensor] = ()
    names: Sequence[str] = ()
    states: Sequence[Mapping[str, Any]] = ()
    group: Mapping[str, Any] = field(default_factory=dict)
    step: int = 0
    rank: int = 0
    shards: ProcessGroup | None = None


class Perturbation(ABC):
    """Displaces the weights before the gradient for their update is taken, and may change that gradient.

    A method whose update is more than the gradient at w + e sets `mixes`. It then gets each gradient as one
    flat vector over all parameters, as the papers write them.
    """

    # Whether the displacement needs the gradient at w, hence one more pass.
    ascends: bool = True
    # Whether `combine` is called. Each rank then combines its own gradients, and the result is averaged.
    mixes: bool = False
    # The name of the state entry for the vector that `combine` returns; "": `combine` returns none.
    remembers: str = ""
    # Whether `displace` needs the parameters' names.
    names: bool = False

    def __post_init__(self) -> None:
        """Check the arguments; dataclasses call this."""
        self.validate()

    def validate(self) -> None:
        """Raise TypeError or ValueError, with a message of one line, for an argument that is not allowed."""
        return

    @abstractmethod
    def displace(self, point: Point) -> dict[str, float]:
        """Move `point.params` by e, in place, and return the metrics to log.

        The caller keeps a copy of w and restores it. If the norm is zero or not finite, or so small that rho
        divided by it does not fit the parameters' dtype, the weights stay where they are. The gradients may
        be overwritten.
        """

    def combine(
        self, ascent: Tensor, descent: Tensor, shards: ProcessGroup | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Return the update, and the vector to keep as a state entry, or None. Called if `mixes` is set.

        Args:
            ascent: the gradient at w; must not be written to.
            descent: the gradient at w + e; may be overwritten.
            shards: the ranks that hold the other parts of the two, see `Point`.
        """
        raise NotImplementedError

    def reuse(self, grad: Tensor, remembered: Tensor, shards: ProcessGroup | None = None) -> Tensor:
        """Return the update of a step without an ascent. Called if `remembers` is set.

        Args:
            grad: the gradient at w; may be overwritten.
            remembered: the state entry, the vector that `combine` returned last; zero before the first one.
            shards: the ranks that hold the other parts of the two, see `Point`.
        """
        raise NotImplementedError

    def metrics(self, loss_gap: Any) -> dict[str, Any]:
        """Return the metrics to log after the descent, given the loss at w + e minus the loss at w."""
        return {"loss_gap": loss_gap}

    def check(self, optimizer: Optimizer) -> None:
        """Raise ValueError, with a message of one line, if this perturbation cannot work with `optimizer`."""
        return


def ratio(rho: float, norm: float, params: Sequence[Tensor]) -> float:
    """Return rho / norm, or 0 if the quotient cannot scale a displacement of `params`; see `displace`.

    Example:
        >>> ratio(0.5, 2.0, [torch.zeros(1)]), ratio(0.5, math.nan, [torch.zeros(1)])
        (0.25, 0.0)
    """
    scale = rho / norm if 0 < norm < math.inf else 0.0
    return scale if all(scale <= torch.finfo(dtype).max for dtype in {p.dtype for p in params}) else 0.0
