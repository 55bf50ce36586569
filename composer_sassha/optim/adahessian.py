"""The update rule of AdaHessian (Yao et al. 2021, arXiv 2006.00719)."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn import Parameter

from composer_sassha.common import validate
from composer_sassha.optim.bias_corrected import BiasCorrectedOptimizer
from composer_sassha.optim.second_order import kept


class AdaHessian(BiasCorrectedOptimizer):
    r"""Adam with the second moment of the spatially averaged Hessian diagonal in place of the gradient's.

    .. math::

        m_t &= \beta_1 m_{t-1} + (1 - \beta_1) g_t \\
        v_t &= \beta_2 v_{t-1} + (1 - \beta_2) (h^{(s)}_t)^2 \quad\text{when an estimate } h_t
        \text{ arrives, else } v_{t-1} \\
        w_{t+1} &= w_t - \eta \frac{m_t / (1 - \beta_1^t)}{\sqrt{v_t / (1 - \beta_2^r)}^{\,k} + \epsilon}
                  - \eta \lambda w_t

    The spatial average `h^(s)` replaces every entry by the mean over its neighbourhood. In a tensor with four
    or five dimensions, the weight of a convolution, that is the kernel (all dimensions but the first two). In
    a matrix it is a block of `block_size` consecutive entries, row by row. All other tensors stay as they
    are: one with three dimensions is more often an embedding than a convolution. The mean is signed, as in
    the paper's equation.

    `r` counts the parameter's estimates. With one every step, as in the paper, r = t. Between estimates v
    stays, and the count of estimates keeps its correction unbiased. The rule does not estimate the Hessian;
    `update_curvature` must be called with an estimate before `step`. In a Composer Trainer, the algorithm
    `LazyHessian(interval=1)` calls it.

    The state of float16 and bfloat16 parameters is float32, also after `load_state_dict`, and their update is
    computed in float32 and rounded once. A parameter without any estimate yet, while others have one (a
    branch that the last refresh did not use), accumulates momentum and does not move. An entry whose v is
    exactly zero is divided by `eps` alone; the `floor` of `LazyCurvature` and `LazyHessian` prevents that.

    Args:
        params: parameters, or dicts of parameter groups with their own hyperparameters.
        lr: learning rate, >= 0; a number, or a tensor of one. Default: 0.15.
        betas: decay of the gradient's and of the Hessian's average, each in [0, 1). Default: (0.9, 0.999).
        eps: added to the preconditioner, >= 0. Default: 1e-4.
        weight_decay: decoupled, as in AdamW: `w *= 1 - lr * weight_decay`; >= 0. Default: 0.
        hessian_power: the exponent k, in [0, 1]. Default: 1.
        block_size: entries of a matrix to average over, >= 1; it must divide the number of entries of every
            matrix in the group. 1: no averaging. Default: 1.
        foreach: one call per operation for all tensors (True or None), or tensor by tensor, in less memory
            (False); the results agree bit for bit on CPU. Default: True.

    Raises:
        TypeError, ValueError: a hyperparameter or a parameter that is not allowed.

    Example:
        >>> w = torch.nn.Parameter(torch.tensor([[1.0, -2.0]]))
        >>> optimizer = AdaHessian([w], lr=0.1, block_size=2)
        >>> w.grad = torch.tensor([[4.0, 4.0]])
        >>> optimizer.update_curvature({w: torch.tensor([[10.0, -6.0]])})
        >>> optimizer.step()
        >>> w.data  # 1 - 0.1 * 4 / 2, -2 - 0.1 * 4 / 2: the mean of 10 and -6 is 2
        tensor([[ 0.8000, -2.2000]])
    """

    _average = "exp_hessian_sq"

    def __init__(
        self,
        params: Iterable[Parameter] | Iterable[dict[str, Any]],
        lr: float = 0.15,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-4,
        weight_decay: float = 0.0,
        hessian_power: float = 1.0,
        block_size: int = 1,
        *,
        foreach: bool | None = True,
    ) -> None:
        own = {"hessian_power": hessian_power, "block_size": block_size}
        super().__init__(params, lr, betas, eps, weight_decay, own, foreach)

    def check_group(self, group: dict[str, Any]) -> None:
        """Check a parameter group's hyperparameters; see `SecondOrderOptimizer`."""
        super().check_group(group)
        validate.number("AdaHessian", "hessian_power", group["hessian_power"], low=0, high=1)
        size = validate.integer("AdaHessian", "block_size", group["block_size"], low=1)
        for p in (p for p in group["params"] if p.requires_grad):
            if isinstance(p, DTensor) and p.ndim == 2 and p.shape[1] % size:
                raise ValueError(
                    f"AdaHessian: block_size={size} is not allowed for a sharded parameter of shape "
                    f"{tuple(p.shape)}; it must divide the length of its rows (1: no averaging)"
                )
            if p.ndim == 2 and p.numel() % size:
                raise ValueError(
                    f"AdaHessian: block_size={size} is not allowed for a parameter of shape "
                    f"{tuple(p.shape)}; it must divide {p.numel()}, its number of entries (1: no averaging)"
                )

    def _prepare(self, estimates: list[Tensor], group: dict[str, Any]) -> list[Tensor]:
        return [spatial_average(h, group["block_size"]) for h in estimates]

    def _absorb(self, states: list[dict[str, Any]], estimates: list[Tensor], group: dict[str, Any]) -> None:
        beta2 = group["betas"][1]
        averages = kept(states, "exp_hessian_sq")
        torch._foreach_mul_(averages, beta2)
        torch._foreach_addcmul_(averages, estimates, estimates, 1 - beta2)

    def _power(self, group: dict[str, Any]) -> float:
        return super()._power(group) / 2  # the average is of squares


def spatial_average(estimate: Tensor, block_size: int) -> Tensor:
    """Replace every entry by the mean over its neighbourhood; see `AdaHessian`.

    Returns:
        A tensor of the same shape, which must not be written to: the estimate itself where nothing is
        averaged, else one whose entries may share memory.

    Example:
        >>> spatial_average(torch.tensor([[1.0, 3.0, 5.0, -7.0]]), block_size=2)
        tensor([[ 2.,  2., -1., -1.]])
    """
    if estimate.ndim in (4, 5):
        return estimate.mean(dim=tuple(range(2, estimate.ndim)), keepdim=True).expand_as(estimate)
    if estimate.ndim == 2 and block_size > 1:
        blocks = estimate.reshape(-1, block_size)
        return blocks.mean(dim=1, keepdim=True).expand_as(blocks).reshape(estimate.shape)
    return estimate
