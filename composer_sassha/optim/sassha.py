"""The update rule of SASSHA (Shin et al. 2025, arXiv 2502.18153)."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

from composer_sassha import _validate
from composer_sassha._tensors import as_dtype, wide_dtype


class SASSHA(Optimizer):
    r"""Preconditions the gradient's average with the square root of an averaged absolute Hessian diagonal.

    .. math::

        m_t &= \beta_1 m_{t-1} + (1 - \beta_1) g_t \\
        D_t &= \beta_2 D_{t-1} + (1 - \beta_2) |h_t| \quad\text{when an estimate } h_t \text{ arrives, else }
        D_{t-1} \\ w_{t+1} &= w_t - \eta \frac{m_t / (1 - \beta_1^t)}{(D_t / (1 - \beta_2^{s}))^p + \epsilon}
                  - \eta \lambda w_t

    with `s` the step of the latest estimate: as in the authors' code, the correction counts steps and is
    frozen between estimates. The rule neither perturbs the weights nor estimates the Hessian: whoever does
    hands the estimate to `update_curvature` before `step`. In a Composer Trainer, the algorithm `Sassha` does
    both.

    The state of float16 and bfloat16 parameters is float32, also after `load_state_dict`, and their update is
    computed in float32 and rounded once. A parameter whose curvature has not been estimated yet, while that
    of others has (a branch that the last refresh did not use), gathers momentum and waits.

    Args:
        params: parameters, or dicts of parameter groups with their own hyperparameters.
        lr: learning rate, >= 0. Default: 0.15.
        betas: decay of the gradient's and of the Hessian's average, each in [0, 1). Default: (0.9, 0.999).
        eps: added to the preconditioner, >= 0. Default: 1e-4.
        weight_decay: decoupled, as in AdamW: `w *= 1 - lr * weight_decay`; >= 0. Default: 0.
        hessian_power: the exponent p, in [0, 1]. Default: 0.5.
        foreach: one call over all tensors per operation (True), or a loop over tensors (False); the results
            agree bit for bit on CPU. Default: True.

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

    def __init__(
        self,
        params: Iterable[Parameter] | Iterable[dict[str, Any]],
        lr: float = 0.15,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-4,
        weight_decay: float = 0.0,
        hessian_power: float = 0.5,
        *,
        foreach: bool = True,
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "hessian_power": hessian_power,
            "foreach": foreach,
        }
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a parameter group; what it does not set it takes from the defaults.

        Raises:
            TypeError, ValueError: a hyperparameter or a parameter that is not allowed.
        """
        _check_group({**self.defaults, **param_group})
        super().add_param_group(param_group)
        for p in self.param_groups[-1]["params"]:
            if not p.is_floating_point():
                self.param_groups.pop()
                raise TypeError(
                    f"SASSHA: a parameter of dtype {p.dtype} is not allowed; it must be real floating point"
                )

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update the parameters that have a gradient.

        Args:
            closure: computes the loss and the gradients again; optional.

        Returns:
            What the closure returned, or None.

        Raises:
            RuntimeError: no curvature has been estimated although a learning rate is positive, or a gradient
                is sparse.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        grads = {p: p.grad for group in self.param_groups for p in group["params"] if p.grad is not None}
        if any(grad.is_sparse for grad in grads.values()):
            raise RuntimeError(
                "SASSHA: sparse gradients are not supported; build the embedding with sparse=False"
            )

        fresh = not self.state
        self._init_state()
        learning = any(group["lr"] > 0 for group in self.param_groups)
        if fresh and not learning and not any(grad.any() for grad in grads.values()):
            # Saving and loading a checkpoint step a fresh optimizer with zero gradients, only to have its
            # state made.
            return loss
        if grads and learning and not any(state["hessian_step"] for state in self.state.values()):
            raise RuntimeError(
                "SASSHA: no Hessian estimate has arrived before this step; add composer_sassha.Sassha() or "
                "LazyHessian() to the Trainer's algorithms, or call update_curvature() before step()"
            )
        for group in self.param_groups:
            buckets = defaultdict(list)  # foreach kernels want one device and one dtype
            for p in group["params"]:
                if p in grads:
                    buckets[p.device, p.dtype].append(p)
            update = _update_foreach if group["foreach"] else _update_each
            for params in buckets.values():
                states = [self.state[p] for p in params]
                update(params, [grads[p] for p in params], states, group)
                for state in states:
                    state["step"] += 1
        return loss

    @torch.no_grad()
    def update_curvature(self, diagonal: Mapping[Tensor, Tensor]) -> None:
        """Average a fresh estimate of the Hessian's diagonal into D, as of the coming step.

        Args:
            diagonal: for each parameter an estimate of the parameter's shape, finite, of either sign. A
                parameter without an entry keeps its D.

        Raises:
            ValueError: a tensor that this optimizer does not train, or an estimate of another shape.
        """
        trained = set(chain.from_iterable(group["params"] for group in self.param_groups))
        for p, h in diagonal.items():
            if p not in trained:
                raise ValueError(
                    f"SASSHA: an estimate for a tensor of shape {tuple(p.shape)} that is not trained here"
                )
            if h.shape != p.shape:
                raise ValueError(
                    f"SASSHA: an estimate of shape {tuple(h.shape)} for a parameter of {tuple(p.shape)}"
                )
        self._init_state()
        for group in self.param_groups:
            params = [p for p in group["params"] if p in diagonal]
            if not params:
                continue
            states = [self.state[p] for p in params]
            averages = [state["exp_hessian"] for state in states]
            fresh = [diagonal[p].to(average) for p, average in zip(params, averages, strict=True)]
            torch._foreach_lerp_(averages, torch._foreach_abs(fresh), 1 - group["betas"][1])
            for state in states:
                state["hessian_step"] = state["step"] + 1

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state; the float32 state of half-precision parameters stays as it was saved."""
        super().load_state_dict(state_dict)
        saved = chain.from_iterable(group["params"] for group in state_dict["param_groups"])
        own = chain.from_iterable(group["params"] for group in self.param_groups)
        for key, p in zip(saved, own, strict=True):
            for name, value in state_dict["state"].get(key, {}).items():
                if name in ("exp_avg", "exp_hessian"):
                    self.state[p][name] = value.to(device=p.device, dtype=wide_dtype([p]))

    def _init_state(self) -> None:
        # Whole and for every trainable parameter: what is created later cannot be loaded from a sharded
        # checkpoint.
        for p in chain.from_iterable(group["params"] for group in self.param_groups):
            if (p.requires_grad or p.grad is not None) and not self.state[p]:
                self.state[p] = {
                    "step": 0,
                    "exp_avg": torch.zeros_like(p, dtype=wide_dtype([p])),
                    "exp_hessian": torch.zeros_like(p, dtype=wide_dtype([p])),
                    "hessian_step": 0,  # 0: never estimated
                }


def _update_each(params: list[Tensor], grads: list[Tensor], states: list[dict], group: dict) -> None:
    """The rule, one tensor at a time: the readable reference of `_update_foreach`."""
    lr, (beta1, beta2), power = group["lr"], group["betas"], group["hessian_power"]
    for p, grad, state in zip(params, grads, states, strict=True):
        state["exp_avg"].lerp_(grad.to(state["exp_avg"]), 1 - beta1)
        if not state["hessian_step"]:
            continue
        denominator = state["exp_hessian"] / (1 - beta2 ** state["hessian_step"])
        denominator = denominator.sqrt_() if power == 0.5 else denominator.pow_(power)
        denominator.add_(group["eps"])
        weights = p.to(denominator.dtype)
        if group["weight_decay"]:
            weights.mul_(1 - lr * group["weight_decay"])
        weights.addcdiv_(state["exp_avg"], denominator, value=-lr / (1 - beta1 ** (state["step"] + 1)))
        if weights is not p:
            p.copy_(weights)


def _update_foreach(params: list[Tensor], grads: list[Tensor], states: list[dict], group: dict) -> None:
    """The rule over tensors of one device and dtype, one call per operation.

    All that needs memory comes first: when there is none, nothing has changed yet.
    """
    lr, (beta1, beta2), power = group["lr"], group["betas"], group["hessian_power"]
    averages = [state["exp_avg"] for state in states]
    ready = [i for i, state in enumerate(states) if state["hessian_step"]]
    grads = as_dtype(grads, averages[0].dtype)
    if ready:
        params, ready_states = [params[i] for i in ready], [states[i] for i in ready]
        denominators = torch._foreach_div(
            [state["exp_hessian"] for state in ready_states],
            [1 - beta2 ** state["hessian_step"] for state in ready_states],
        )
        weights = as_dtype(params, averages[0].dtype)

    torch._foreach_lerp_(averages, grads, 1 - beta1)
    if not ready:
        return
    if power == 0.5:
        torch._foreach_sqrt_(denominators)
    else:
        torch._foreach_pow_(denominators, power)
    torch._foreach_add_(denominators, group["eps"])
    if group["weight_decay"]:
        torch._foreach_mul_(weights, 1 - lr * group["weight_decay"])
    rates = [-lr / (1 - beta1 ** (state["step"] + 1)) for state in ready_states]
    torch._foreach_addcdiv_(weights, [averages[i] for i in ready], denominators, rates)
    if weights is not params:
        torch._foreach_copy_(params, weights)


def _check_group(group: dict[str, Any]) -> None:
    _validate.boolean("SASSHA", "foreach", group["foreach"])
    _validate.number("SASSHA", "lr", group["lr"], low=0)
    betas = group["betas"]
    if not isinstance(betas, (tuple, list)) or len(betas) != 2:
        raise TypeError(f"SASSHA: betas={betas!r} is not allowed; it must be two numbers, each in [0, 1)")
    for i, beta in enumerate(betas):
        _validate.number("SASSHA", f"betas[{i}]", beta, low=0, high=1, below=True)
    _validate.number("SASSHA", "eps", group["eps"], low=0)
    _validate.number("SASSHA", "weight_decay", group["weight_decay"], low=0)
    _validate.number("SASSHA", "hessian_power", group["hessian_power"], low=0, high=1)
