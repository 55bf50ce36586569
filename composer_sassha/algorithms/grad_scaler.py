"""Gradient scaling for optimizers whose step runs several passes."""

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.amp.grad_scaler import OptState
from torch.optim import Optimizer

from composer_sassha.common.ranks import ALONE, Group, Ranks, given_ranks
from composer_sassha.optim import SharpnessAwareOptimizer
from composer_sassha.optim.parameters import ParameterView


class ClosureGradScaler(torch.amp.GradScaler):
    """Scales gradients for optimizers that call a closure once per pass, such as SAM.

    Every pass is unscaled and checked. If the gradient overflowed on any of the ranks that share it, the
    closure returns None on all of them. `SharpnessAwareOptimizer` then skips the step and leaves everything
    as it was. The step of an optimizer that takes one gradient, such as SGD, is not called at all. `update`
    then lowers the scale, once per step. In all else it is its base class: a checkpoint of the one continues
    under the other, with its scale. (A checkpoint of Composer's own SAM has another name for it, and starts
    with a fresh scale.)

    In a Composer Trainer with precision='amp_fp16', the algorithms install it. In your own loop, call
    `step(optimizer, closure=...)`, scale the loss within the closure, and call `update()` after the step.

    Args:
        device: 'cuda' or 'cpu'. Default: 'cuda'. All arguments but `process_group` are those of
            `torch.amp.GradScaler`.
        process_group: the ranks that back off together; False: this rank alone. Default: those that share the
            gradient of a `SharpnessAwareOptimizer`. For any other optimizer it is this rank alone, which is
            enough where all ranks have the same gradient, as under DistributedDataParallel.

    Example:
        >>> w = torch.nn.Parameter(torch.tensor([1.0]))
        >>> scaler = ClosureGradScaler("cpu", init_scale=4.0)
        >>> optimizer = torch.optim.SGD([w], lr=0.1)
        >>> def closure():
        ...     optimizer.zero_grad()
        ...     loss = (w**2).sum()
        ...     scaler.scale(loss).backward()
        ...     return loss.detach()
        >>> scaler.step(optimizer, closure=closure)
        tensor(1.)
        >>> scaler.update()
        >>> w.data  # 1 - 0.1 * 2
        tensor([0.8000])
    """

    def __init__(self, *args: Any, process_group: Group = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._given = given_ranks("ClosureGradScaler", process_group)

    def step(self, optimizer: Optimizer, *args: Any, closure: Callable[..., Any], **kwargs: Any) -> Any:
        """Step the optimizer with a closure whose gradients are unscaled and checked.

        Args:
            optimizer: called as `optimizer.step(closure=...)` if its closure may return None, which its
                attribute `_step_supports_amp_closure` says, as for Composer's Trainer. Any other optimizer is
                called without a closure, and only if the gradient is finite.
            *args: passed on to the optimizer's `step`.
            closure: computes the loss and the gradients of its scaled value, and returns the loss.
            **kwargs: passed on to the optimizer's `step`.

        Returns:
            The loss, or None if the step was skipped.

        Raises:
            TypeError: the optimizer needs a closure and cannot skip a step.
        """
        step: Callable[..., Any] = optimizer.step
        if not self._enabled:
            return step(*args, closure=closure, **kwargs)

        ranks = self._given or ALONE
        if isinstance(optimizer, SharpnessAwareOptimizer):
            ranks = ParameterView(optimizer, optimizer.model, self._given or optimizer.process_group).ranks
        wrapped = id(getattr(optimizer, "base_optimizer", optimizer))

        @functools.wraps(closure)
        def checked(**settings: Any) -> Any:
            # One state for wrapper and base optimizer: a closure that clips may pass either to `unscale_`.
            state = self._per_optimizer_states[wrapped] = self._per_optimizer_states[id(optimizer)]
            state["stage"], state["found_inf_per_device"] = OptState.READY, {}
            try:
                loss = closure(**settings)
            finally:
                if wrapped != id(optimizer):
                    del self._per_optimizer_states[wrapped]
            if state["stage"] is OptState.READY:  # else the Trainer has unscaled, to clip
                self.unscale_(optimizer)
            return None if self._overflowed(state, ranks, skipped=loss is None) else loss

        if isinstance(optimizer, SharpnessAwareOptimizer):
            kwargs["scaler"] = self  # the Hessian must not have the gradient's scale
        if getattr(optimizer, "_step_supports_amp_closure", False):
            return step(*args, closure=checked, **kwargs)
        needed = inspect.signature(step).parameters.get("closure")
        if needed is not None and needed.default is inspect.Parameter.empty:
            raise TypeError(
                f"ClosureGradScaler: {type(optimizer).__name__} runs closures of its own, and would take "
                "steps with gradients that overflowed; use another optimizer, or bfloat16 and no scaler"
            )
        with torch.enable_grad():
            loss = checked()
        if loss is not None:
            step(*args, **kwargs)
        return loss

    def _overflowed(self, state: dict[str, Any], ranks: Ranks, skipped: bool) -> bool:
        """Whether the gradient overflowed, or the closure returned None, on any of the ranks; all back off.

        One collective, which every rank must reach: a rank that skipped alone would drift apart.
        """
        found: list[Tensor] = list(state["found_inf_per_device"].values())
        if not found:  # no gradient on this rank, though others may have one
            found = [torch.zeros((), device=self._device)]
            state["found_inf_per_device"] = {found[0].device: found[0]}
        here = torch.stack([f.reshape(()).to(found[0].device) for f in found]).sum() > 0
        overflowed = ranks.any(here | skipped)
        for f in found:
            f.fill_(float(overflowed))
        return overflowed


# Composer keys the scaler's state by its class's __qualname__, and pickle looks the class up by it.
ClosureGradScaler.__qualname__ = torch.amp.GradScaler.__qualname__
GradScaler = ClosureGradScaler
