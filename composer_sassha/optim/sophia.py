"""The update rule of Sophia (Liu et al. 2024, arXiv 2305.14342)."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from composer_sassha.common import validate
from composer_sassha.optim.second_order import SecondOrderOptimizer, kept


class Sophia(SecondOrderOptimizer):
    r"""Divides the gradient's average by the Hessian diagonal's average, and clips every entry of the step.

    .. math::

        m_t &= \beta_1 m_{t-1} + (1 - \beta_1) g_t \\
        h_t &= \beta_2 h_{t-1} + (1 - \beta_2) \hat h_t \quad\text{when an estimate } \hat h_t
        \text{ arrives, else } h_{t-1} \\
        w_{t+1} &= w_t - \eta \lambda w_t
                  - \eta \operatorname{clip}\!\left(\frac{m_t}{\max(\gamma h_t, \epsilon)}, 1\right)

    with `clip(x, 1)` the number in [-1, 1] that is nearest to x. An entry with `|m| >= max(gamma * h, eps)`
    moves by the whole learning rate, against the sign of m. So does every entry whose h is not positive,
    unless `|m| < eps`. The estimate keeps its sign, and neither average is corrected for its start. The rule
    does not estimate the Hessian; `update_curvature` must be called with an estimate before `step`. In a
    Composer Trainer, the algorithm `LazyHessian` calls it.

    The state of float16 and bfloat16 parameters is float32, also after `load_state_dict`, and their update is
    computed in float32 and rounded once. A parameter without any estimate yet, while others have one (a
    branch that the last refresh did not use), accumulates momentum and does not move.

    Args:
        params: parameters, or dicts of parameter groups with their own hyperparameters.
        lr: learning rate, >= 0, which is also the largest change of an entry in a step; a number, or a tensor
            of one. Default: 1e-3.
        betas: decay of the gradient's and of the Hessian's average, each in [0, 1). Default: (0.96, 0.99).
        eps: the smallest divisor, >= 0; 0 stands for the smallest normal number. Default: 1e-12.
        weight_decay: decoupled, as in AdamW: `w *= 1 - lr * weight_decay`; >= 0. Default: 0.
        clip_threshold: the paper's gamma, >= 0: the larger, the fewer entries are clipped; 0: momentum's
            sign everywhere unless |m| < eps. Default: 0.01.
        foreach: one call per operation for all tensors (True or None), or tensor by tensor, in less memory
            (False); the results agree bit for bit on CPU. Default: True.

    Raises:
        TypeError, ValueError: a hyperparameter or a parameter that is not allowed.

    Example:
        >>> w = torch.nn.Parameter(torch.tensor([1.0, -2.0, 3.0]))
        >>> optimizer = Sophia([w], lr=0.1, betas=(0.0, 0.0), clip_threshold=0.5)
        >>> w.grad = torch.tensor([4.0, 4.0, 4.0])
        >>> optimizer.update_curvature({w: torch.tensor([16.0, 2.0, -4.0])})
        >>> optimizer.step()
        >>> w.data  # 1 - 0.1 * 4 / (0.5 * 16), and the others by 0.1
        tensor([ 0.9500, -2.1000,  2.9000])
    """

    def __init__(
        self,
        params: Iterable[Parameter] | Iterable[dict[str, Any]],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.96, 0.99),
        eps: float = 1e-12,
        weight_decay: float = 0.0,
        clip_threshold: float = 0.01,
        *,
        foreach: bool | None = True,
    ) -> None:
        own = {"clip_threshold": clip_threshold}
        super().__init__(params, lr, betas, eps, weight_decay, own, foreach)

    def check_group(self, group: dict[str, Any]) -> None:
        """Check a parameter group's hyperparameters; see `SecondOrderOptimizer`."""
        super().check_group(group)
        validate.number("Sophia", "clip_threshold", group["clip_threshold"], low=0)

    def _absorb(self, states: list[dict[str, Any]], estimates: list[Tensor], group: dict[str, Any]) -> None:
        averages = kept(states, "exp_hessian")
        torch._foreach_lerp_(averages, estimates, 1 - group["betas"][1])

    def _denominators(self, states: list[dict[str, Any]], group: dict[str, Any]) -> list[Tensor]:
        averages = kept(states, "exp_hessian")
        denominators = list(torch._foreach_mul(averages, group["clip_threshold"]))
        # A divisor of at least the smallest normal number has a finite reciprocal. Then 0 / eps is 0 and not
        # NaN, and a product that overflows is clipped.
        tiny = torch.finfo(denominators[0].dtype).tiny
        torch._foreach_clamp_min_(denominators, max(group["eps"], tiny))
        return denominators

    def _update(
        self,
        weights: list[Tensor],
        states: list[dict[str, Any]],
        denominators: list[Tensor],
        group: dict[str, Any],
    ) -> None:
        averages = kept(states, "exp_avg")
        steps = denominators  # reuses their memory
        torch._foreach_reciprocal_(steps)
        torch._foreach_mul_(steps, averages)
        torch._foreach_clamp_min_(steps, -1)
        torch._foreach_clamp_max_(steps, 1)
        torch._foreach_add_(weights, steps, alpha=-group["lr"])
