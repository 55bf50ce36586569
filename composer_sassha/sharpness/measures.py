"""All measures of sharpness in one call, the cheap ones first."""

import contextlib
import time
from dataclasses import dataclass

import torch

from composer_sassha.common import validate
from composer_sassha.common.ranks import ALONE, Ranks
from composer_sassha.perturbations import SAMPerturbation
from composer_sassha.sharpness.hessian import top_eigenvalues, trace
from composer_sassha.sharpness.objective import Objective, Unfinished
from composer_sassha.sharpness.perturbed_loss import (
    asam_sharpness,
    average_sharpness,
    m_sharpness,
    positive,
    rise,
    sam_sharpness,
)


@dataclass(frozen=True)
class Measures:
    """Selects the measures and their accuracy. A number of 0, or an empty tuple, omits a measure.

    The cost, in units of one gradient over all samples, is about

    - 1 for the loss with its gradient
    - 2 for `sam` per ascent step, and 2 for `asam`
    - two thirds of `directions`
    - 2 for each m, in small batches
    - 3 for each of the `trace_samples`
    - 3 for each product of `eigsh`, which needs at least 20, usually 30 to 100

    Args:
        eigenvalues: the number of the Hessian's largest eigenvalues, >= 0. Default: 5.
        tol: their relative accuracy, see `top_eigenpairs`, > 0. Default: 1e-3.
        trace_samples: random vectors for the trace, 0 or >= 2. Default: 16.
        rho: radius of SAM's sharpness, m-sharpness and the average, > 0. Default: 0.05.
        ascent_steps: ascent steps of SAM's sharpness and m-sharpness, >= 1. Default: 1.
        m: group sizes of m-sharpness. Default: (16, 64).
        directions: random directions for the average, 0 or >= 2. Default: 10.
        asam_rho: radius of adaptive sharpness, >= 0. Default: 0.5.
        seed: determines all random draws, >= 0. Default: 0.

    Raises:
        TypeError, ValueError: an argument that is not allowed.
    """

    eigenvalues: int = 5
    tol: float = 1e-3
    trace_samples: int = 16
    rho: float = 0.05
    ascent_steps: int = 1
    m: tuple[int, ...] = (16, 64)
    directions: int = 10
    asam_rho: float = 0.5
    seed: int = 0

    def __post_init__(self) -> None:
        """Check the arguments."""
        owner = "Measures"
        for name, low in (("eigenvalues", 0), ("ascent_steps", 1), ("seed", 0)):
            validate.integer(owner, name, getattr(self, name), low=low)
        for name in ("trace_samples", "directions"):
            if validate.integer(owner, name, getattr(self, name), low=0) == 1:
                raise ValueError(
                    f"{owner}: {name}=1 is not allowed; it must be 0, or at least 2 for a standard error"
                )
        validate.number(owner, "tol", self.tol, low=1e-15)
        validate.number(owner, "asam_rho", self.asam_rho, low=0)
        positive("rho", self.rho)
        if not isinstance(self.m, (tuple, list)):
            raise TypeError(f"{owner}: m={self.m!r} is not allowed; it must be a tuple such as (16, 64)")
        object.__setattr__(self, "m", tuple(self.m))  # YAML has lists only
        for m in self.m:
            validate.integer(owner, "m", m, low=1)


def measure(objective: Objective, measures: Measures) -> dict[str, float]:
    """Return the measures by name, the cheap ones first; a measure that could not be finished is absent.

    - `loss`, and `full_grad_norm`, the norm of the gradient over all batches
    - `sam`: SAM's sharpness (`sam_sharpness`)
    - `surrogate_gap`: GSAM's h, and `gap_eigenvalue`, its estimate `2 h / rho^2` of the largest eigenvalue
    - `asam`: adaptive sharpness (`asam_sharpness`)
    - `average`: average-case sharpness (`average_sharpness`), and `average_error`, its standard error
    - `m<m>`: m-sharpness (`m_sharpness`)
    - `lambda_1` to `lambda_<k>`: the largest eigenvalues (`top_eigenpairs`), `lambda_max`, the first of them,
      and, if the fifth is positive, `lambda_max_over_lambda_5`
    - `trace`: the Hessian's (`trace`), and `trace_error`, its standard error

    Args:
        objective: has the weights to measure at.
        measures: the selection of measures.

    Raises:
        SettingError: an operation of the model has no second derivative.
    """
    found: dict[str, float] = {}
    for part in (_slope, _gap, _sam, _asam, _average, _groups, _eigenvalues, _trace):
        with contextlib.suppress(Unfinished):
            part(objective, measures, found)
    return found


def _slope(objective: Objective, measures: Measures, found: dict[str, float]) -> None:
    found["loss"] = objective.loss()
    found["full_grad_norm"] = torch.linalg.vector_norm(objective.gradient().double()).item()


def _gap(objective: Objective, measures: Measures, found: dict[str, float]) -> None:
    gap = rise(objective, SAMPerturbation(measures.rho))
    found |= {"surrogate_gap": gap, "gap_eigenvalue": 2 * gap / measures.rho**2}


def _sam(objective: Objective, measures: Measures, found: dict[str, float]) -> None:
    if measures.ascent_steps == 1 and "surrogate_gap" in found:
        found["sam"] = found["surrogate_gap"]
    else:
        found["sam"] = sam_sharpness(objective, measures.rho, measures.ascent_steps)


def _asam(objective: Objective, measures: Measures, found: dict[str, float]) -> None:
    if measures.asam_rho:
        found["asam"] = asam_sharpness(objective, measures.asam_rho)


def _average(objective: Objective, measures: Measures, found: dict[str, float]) -> None:
    if measures.directions:
        mean, error = average_sharpness(objective, measures.rho, measures.directions, measures.seed)
        found |= {"average": mean, "average_error": error}


def _groups(objective: Objective, measures: Measures, found: dict[str, float]) -> None:
    for m in measures.m:
        found[f"m{m}"] = m_sharpness(objective, m, measures.rho, measures.ascent_steps)


def _eigenvalues(objective: Objective, measures: Measures, found: dict[str, float]) -> None:
    if not measures.eigenvalues:
        return
    values = top_eigenvalues(objective, measures.eigenvalues, measures.tol, measures.seed).tolist()
    found |= eigenvalue_metrics(values)


def eigenvalue_metrics(values: list[float]) -> dict[str, float]:
    """Return the metrics for the largest eigenvalues, given in descending order.

    Example:
        >>> eigenvalue_metrics([6.0, 2.0])
        {'lambda_1': 6.0, 'lambda_2': 2.0, 'lambda_max': 6.0}
    """
    named = {f"lambda_{i}": value for i, value in enumerate(values, start=1)}
    if values:
        named["lambda_max"] = values[0]
    if len(values) >= 5 and values[4] > 0:
        named["lambda_max_over_lambda_5"] = values[0] / values[4]
    return named


def _trace(objective: Objective, measures: Measures, found: dict[str, float]) -> None:
    if measures.trace_samples:
        mean, error = trace(objective, measures.trace_samples, measures.seed)
        found |= {"trace": mean, "trace_error": error}


class Deadline:
    """A tick that raises when the time is over, on all ranks at the same evaluation.

    Args:
        seconds: the time, from now.
        device: the device of the collective in which the ranks agree.
        ranks: those that measure together. Default: this process alone.
    """

    def __init__(self, seconds: float, device: torch.device, ranks: Ranks = ALONE) -> None:
        self._end, self._device, self._ranks = time.monotonic() + seconds, device, ranks

    def __call__(self) -> None:
        """Raise Unfinished if the time is over on any rank.

        Clocks differ between ranks. A rank that stopped by its own would leave the others in a collective.
        """
        if self._ranks.any(torch.tensor(time.monotonic() > self._end, device=self._device)):
            raise Unfinished("the time is over")
