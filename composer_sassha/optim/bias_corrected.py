"""The step of update rules whose two averages are corrected for their start at zero, as Adam's are."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from composer_sassha.common.sharding import local, shards_of
from composer_sassha.optim.second_order import SecondOrderOptimizer, kept


class BiasCorrectedOptimizer(SecondOrderOptimizer):
    """Moves the weights by `-lr * (m / (1 - b1**t)) / ((h / (1 - b2**age)) ** power + eps)`.

    m is the average of the gradients and h that of the estimates. A subclass defines how an estimate enters
    h, and the power.
    """

    def _power(self, group: dict[str, Any]) -> float:
        """Return the exponent of the corrected average of the estimates."""
        power: float = group["hessian_power"]
        return power

    @torch.no_grad()
    def zero_fraction(self) -> Tensor:
        """Return the fraction, of the entries that the coming step moves, that it divides by `eps` alone.

        These have a gradient, or had one before, and an average of the estimates of exactly zero.
        """
        moving = [p for p in self._params() if p.grad is not None]
        params = [p for p in moving if self.state.get(p, {}).get("hessian_step")]
        states, counts = [self.state[p] for p in params], []
        for grad, m, h in zip(
            local(p.grad for p in params), kept(states, "exp_avg"), kept(states, self._average), strict=True
        ):
            moved = (grad != 0) | (m != 0)
            counts.append(torch.stack([(moved & (h == 0)).sum(), moved.sum()]))
        if not counts:
            return torch.zeros(())
        total = torch.stack([count.to(counts[0].device) for count in counts]).sum(dim=0)
        if (shards := shards_of(params)) is not None:
            dist.all_reduce(total, group=shards.group)
        zero, count = total.to(torch.float64)
        return torch.div(zero, count.clamp(min=1))

    def _denominators(self, states: list[dict[str, Any]], group: dict[str, Any]) -> list[Tensor]:
        averages, ages = kept(states, self._average), [state["hessian_step"] for state in states]
        return corrected_denominators(averages, ages, self._power(group), group)

    def _update(
        self,
        weights: list[Tensor],
        states: list[dict[str, Any]],
        denominators: list[Tensor],
        group: dict[str, Any],
    ) -> None:
        averages = kept(states, "exp_avg")
        rates = [-group["lr"] / (1 - group["betas"][0] ** state["step"]) for state in states]
        # Unlike the other foreach operations, this one takes a single number only by another keyword.
        rate = one_or_all(rates)
        if isinstance(rate, list):
            torch._foreach_addcdiv_(weights, averages, denominators, rate)
        else:
            torch._foreach_addcdiv_(weights, averages, denominators, value=rate)


def corrected_denominators(
    averages: list[Tensor], ages: list[int], power: float, group: dict[str, Any]
) -> list[Tensor]:
    """Return `(average / (1 - b2**age)) ** power + eps` for each average, in new tensors.

    Example:
        >>> group = {"betas": (0.9, 0.5), "eps": 1.0}
        >>> corrected_denominators([torch.tensor([2.0, 8.0])], [1], 0.5, group)
        [tensor([3., 5.])]
    """
    corrections = [1 - group["betas"][1] ** age for age in ages]
    denominators = list(torch._foreach_div(averages, one_or_all(corrections)))
    if power == 0.5:  # a square root is faster than a power
        torch._foreach_sqrt_(denominators)
    elif power != 1:
        torch._foreach_pow_(denominators, power)
    torch._foreach_add_(denominators, group["eps"])
    return denominators


def one_or_all(numbers: list[float]) -> float | list[float]:
    """Return one number if all are equal, which makes a faster foreach call; else all of them.

    Example:
        >>> one_or_all([0.5, 0.5]), one_or_all([0.5, 1.0])
        (0.5, [0.5, 1.0])
    """
    return numbers[0] if len(set(numbers)) == 1 else numbers
