"""What a perturbation is: where the gradient is taken, and what is made of it."""

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
    """The weights, what is known about them, and the step at which they stand.

    Args:
        params: the weights to displace.
        grads: their gradients at w; empty for a perturbation that does without (`ascends` is False).
        names: their names, as `named_parameters` has them; empty unless the perturbation asks for them.
        states: what the base optimizer keeps for each, momentum for instance.
        group: the base optimizer's first parameter group, for the learning rate.
        step: the number of steps taken; with `rank` it seeds what is drawn at random.
        rank: of this process; of sharded weights, the number of its part.
        shards: the ranks that hold the other parts of sharded weights (`params`, `grads` and `states` are
            those of this rank's part); None: the weights are whole.
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
    """Displaces the weights before the gradient that updates them is taken, and may work on that gradient.

    A method whose update is more than the gradient at w + e sets `mixes`, and gets all gradients as flat
    vectors: one over all parameters, as the papers write them.
    """

    # Whether the displacement needs the gradient at w, and with it a pass.
    ascends: bool = True
    # Whether `combine` is called. Then the ranks combine their own gradients and average the result.
    mixes: bool = False
    # The name under which the optimizer's state keeps the vector that `combine` returns; "": it returns none.
    remembers: str = ""
    # Whether `displace` needs the parameters' names.
    names: bool = False

    def __post_init__(self) -> None:
        """Called by dataclasses: check the arguments."""
        self.validate()

    def validate(self) -> None:
        """Raise TypeError or ValueError, in one line, for an argument that is not allowed."""
        return

    @abstractmethod
    def displace(self, point: Point) -> dict[str, float]:
        """Move `point.params` in place by e, and return what to log about it.

        Whoever calls this keeps w and puts it back. A norm that is zero or not finite displaces by nothing,
        and so does one so small that the parameters' dtype cannot hold rho over it. The gradients may be
        overwritten.
        """

    def combine(
        self, ascent: Tensor, descent: Tensor, shards: ProcessGroup | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Return the vector to update with, and the one to remember, if any. Called if `mixes` is set.

        Args:
            ascent: the gradient at w; left as it is.
            descent: the gradient at w + e; may be overwritten.
            shards: the ranks that hold the other parts of the two, see `Point`.
        """
        raise NotImplementedError

    def reuse(self, grad: Tensor, remembered: Tensor, shards: ProcessGroup | None = None) -> Tensor:
        """Return the vector to update with on a step without an ascent. Called if `remembers` is set.

        Args:
            grad: the gradient at w; may be overwritten.
            remembered: what `combine` returned last, zero if nothing yet.
            shards: the ranks that hold the other parts of the two, see `Point`.
        """
        raise NotImplementedError

    def metrics(self, loss_gap: Any) -> dict[str, Any]:
        """Return what to log once the loss at w + e is known, given how much it is above that at w."""
        return {"loss_gap": loss_gap}

    def check(self, optimizer: Optimizer) -> None:
        """Raise ValueError, in one line, if this perturbation cannot work around `optimizer`."""
        return


def ratio(rho: float, norm: float, params: Sequence[Tensor]) -> float:
    """Return rho / norm, or 0 where that cannot scale a displacement of `params`; see `displace`.

    Example:
        >>> ratio(0.5, 2.0, [torch.zeros(1)]), ratio(0.5, math.nan, [torch.zeros(1)])
        (0.25, 0.0)
    """
    scale = rho / norm if 0 < norm < math.inf else 0.0
    return scale if all(scale <= torch.finfo(dtype).max for dtype in {p.dtype for p in params}) else 0.0
