"""Momentum-SAM (Becker et al. 2024, arXiv 2401.12033)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from composer_sassha.common import validate
from composer_sassha.common.tensors import global_norm
from composer_sassha.perturbations.base import (
    Descent,
    Displacement,
    Perturbation,
    Point,
    Program,
    ratio,
)
from composer_sassha.perturbations.momentum import NAMES, momentum_of, will_keep_momentum


@dataclass
class MSAMPerturbation(Perturbation):
    """Displaces by `e = -rho * m / ||m||` along the base optimizer's momentum m, without a second pass.

    m is `momentum_buffer` of SGD, and `exp_avg` of the Adam family and of SASSHA. The norm is over all
    parameters. On the first step there is no momentum yet, hence no displacement.

    Args:
        rho: radius of the neighbourhood, >= 0. Default: 3.

    Raises:
        TypeError, ValueError: `rho` is not a finite number >= 0.

    Example:
        >>> import torch
        >>> w = torch.zeros(2)
        >>> at = Point([w], states=[{"momentum_buffer": torch.tensor([3.0, 4.0])}])
        >>> (descent,) = MSAMPerturbation(rho=0.5).step(at)
        >>> descent.e.apply()
        >>> w
        tensor([-0.3000, -0.4000])
    """

    ascends = False

    rho: float = 3.0

    def validate(self) -> None:
        """Check the arguments; see `Perturbation`."""
        validate.number("MSAM", "rho", self.rho, low=0)

    def step(self, at: Point) -> Program:
        """Yield one pass, at w + e; see `Perturbation.step`."""
        found = [(p, _momentum(state)) for p, state in zip(at.params, at.states, strict=True)]
        moving = [(p, m) for p, m in found if m is not None]
        params, momenta = [p for p, _ in moving], [m for _, m in moving]
        norm = global_norm(momenta, at.shards)
        at.metrics |= {"rho": self.rho, "momentum_norm": norm}
        yield Descent(Displacement(params, momenta, -ratio(self.rho, norm, params)))
        return None

    def check(self, optimizer: Optimizer) -> None:
        """Refuse an optimizer without momentum; see `Perturbation`."""
        if not will_keep_momentum(optimizer):
            raise ValueError(
                f"MSAM: {type(optimizer).__name__} keeps no momentum to perturb along; "
                "use SGD(momentum=0.9), AdamW or SASSHA, or another perturbation"
            )


def _momentum(state: Mapping[str, Any]) -> Tensor | None:
    if state and not state.keys() & {*NAMES}:
        raise RuntimeError(
            f"MSAM: the optimizer keeps no {' or '.join(NAMES)}, but {', '.join(map(str, state))}; "
            "use another optimizer or another perturbation"
        )
    return momentum_of(state)
