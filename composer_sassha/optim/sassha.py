"""The update rule of SASSHA (Shin et al. 2025, arXiv 2502.18153)."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from composer_sassha.common import validate
from composer_sassha.optim.bias_corrected import BiasCorrectedOptimizer
from composer_sassha.optim.second_order import kept


class SASSHA(BiasCorrectedOptimizer):
    r"""Divides the gradient's average by the square root of the averaged absolute Hessian diagonal.

    .. math::

        m_t &= \beta_1 m_{t-1} + (1 - \beta_1) g_t \\
        D_t &= \beta_2 D_{t-1} + (1 - \beta_2) |h_t| \quad\text{when an estimate } h_t \text{ arrives, else }
        D_{t-1} \\ w_{t+1} &= w_t - \eta \frac{m_t / (1 - \beta_1^t)}{(D_t / (1 - \beta_2^{s}))^p + \epsilon}
                  - \eta \lambda w_t

    with `s` the step of the latest estimate: as in the authors' code, the correction counts steps and is
    frozen between estimates. The rule neither perturbs the weights nor estimates the Hessian;
    `update_curvature` must be called with an estimate before `step`. In a Composer Trainer, the algorithm
    `Sassha` does both.

    The state of float16 and bfloat16 parameters is float32, also after `load_state_dict`, and their update is
    computed in float32 and rounded once. A parameter without any estimate yet, while others have one (a
    branch that the last refresh did not use), accumulates momentum and does not move. An entry whose D is
    exactly zero is divided by `eps` alone; the `floor` of `LazyCurvature` and `Sassha` prevents that.

    Args:
        params: parameters, or dicts of parameter groups with their own hyperparameters.
        lr: learning rate, >= 0; a number, or a tensor of one. Default: 0.15.
        betas: decay of the gradient's and of the Hessian's average, each in [0, 1). Default: (0.9, 0.999).
        eps: added to the preconditioner, >= 0. Default: 1e-4.
        weight_decay: decoupled, as in AdamW: `w *= 1 - lr * weight_decay`; >= 0. Default: 0.
        hessian_power: the exponent p, in [0, 1]. Default: 0.5.
        foreach: one call per operation for all tensors (True or None), or tensor by tensor, in less memory
            (False); the results agree bit for bit on CPU. Default: True.

    Raises:
        TypeError, ValueError: a hyperparameter or a parameter that is not allowed.

    Example:
        >>> w = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
        >>> optimizer = SASSHA([w], lr=0.1)
        >>> w.grad = torch.tensor([4.0, 4.0])
        >>> optimizer.update_curvature({w: torch.tensor([16.0, -4.0])})
        >>> optimizer.step()
        >>> w.data  # 1 - 0.1 * 4 / sqrt(16), -2 - 0.1 * 4 / sqrt(4)
        tensor([ 0.9000, -2.2000])
    """

    _remedy = "composer_sassha.Sassha() or LazyHessian()"

    def __init__(
        self,
        params: Iterable[Parameter] | Iterable[dict[str, Any]],
        lr: float = 0.15,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-4,
        weight_decay: float = 0.0,
        hessian_power: float = 0.5,
        *,
        foreach: bool | None = True,
    ) -> None:
        own = {"hessian_power": hessian_power}
        super().__init__(params, lr, betas, eps, weight_decay, own, foreach)

    def check_group(self, group: dict[str, Any]) -> None:
        """Check a parameter group's hyperparameters; see `SecondOrderOptimizer`."""
        super().check_group(group)
        validate.number("SASSHA", "hessian_power", group["hessian_power"], low=0, high=1)

    def _prepare(self, estimates: list[Tensor], group: dict[str, Any]) -> list[Tensor]:
        return list(torch._foreach_abs(estimates))

    def _absorb(self, states: list[dict[str, Any]], estimates: list[Tensor], group: dict[str, Any]) -> None:
        averages = kept(states, "exp_hessian")
        torch._foreach_lerp_(averages, estimates, 1 - group["betas"][1])

    def _age(self, state: dict[str, Any]) -> int:
        steps: int = state["step"]  # not estimates, as in the authors' code
        return steps + 1
