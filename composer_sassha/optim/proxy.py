"""A wrapper that is, to whatever looks at it, the optimizer that it wraps."""

import functools
import inspect
from typing import Any

from torch import Tensor
from torch.optim import Optimizer
from torch.utils._pytree import tree_map


def _shared(name: str) -> property:
    return property(
        lambda proxy: getattr(proxy.base_optimizer, name),
        lambda proxy, value: setattr(proxy.base_optimizer, name, value),
    )


class OptimizerProxy(Optimizer):
    """Shares the parameter groups, the state and the hooks of a base optimizer, and its name.

    Args:
        base_optimizer: what updates the weights.

    Raises:
        TypeError: it is no optimizer, is wrapped already, or runs closures of its own.
    """

    def __new__(cls, base_optimizer: Optimizer, *args: Any, **kwargs: Any) -> "OptimizerProxy":
        """Return an instance of a subclass that has the base optimizer's name, as checkpoints need."""
        return object.__new__(_named_after(cls, type(base_optimizer)))  # type: ignore[arg-type]  # hashable

    def __init__(self, base_optimizer: Optimizer) -> None:
        if isinstance(base_optimizer, OptimizerProxy):
            raise TypeError("SharpnessAwareOptimizer: the base optimizer is wrapped already; wrap it once")
        if not isinstance(base_optimizer, Optimizer):
            raise TypeError(
                f"SharpnessAwareOptimizer: base_optimizer={base_optimizer!r} is not a torch.optim.Optimizer"
            )
        closure = inspect.signature(base_optimizer.step).parameters.get("closure")
        if closure is not None and closure.default is inspect.Parameter.empty:
            raise TypeError(
                f"SharpnessAwareOptimizer: {type(base_optimizer).__name__} runs closures of its own and "
                "cannot be wrapped"
            )
        self.base_optimizer = base_optimizer

    # The base optimizer's own, always: nothing can come apart, not after load_state_dict either.
    state = _shared("state")
    param_groups = _shared("param_groups")
    defaults = _shared("defaults")

    def __getattr__(self, name: str) -> Any:
        if name == "base_optimizer":  # not set yet
            raise AttributeError(name)
        return getattr(self.base_optimizer, name)

    def zero_grad(self, *args: Any, **kwargs: Any) -> None:
        """Reset the gradients, as the base optimizer does."""
        self.base_optimizer.zero_grad(*args, **kwargs)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a parameter group to the base optimizer."""
        self.base_optimizer.add_param_group(param_group)

    def state_dict(self) -> dict[str, Any]:
        """Return the base optimizer's state dict, in containers of its own.

        A caller may delete entries (Composer does for `save_ignore_keys`) without deleting the optimizer's.

        Raises:
            RuntimeError: parameters with a state have been taken out of the groups.
        """
        params = {p for group in self.param_groups for p in group["params"]}
        # Some optimizers keep state under strings too, which is no parameter's.
        if removed := len({key for key in self.state if isinstance(key, Tensor)} - params):
            raise RuntimeError(
                f"{removed} parameters with a state have been taken out of the optimizer's groups "
                "(LayerFreezing does), and neither PyTorch nor Composer can save and resume such a run; "
                "freeze them from the start with requires_grad_(False), or save no checkpoint"
            )
        copy: dict[str, Any] = tree_map(lambda leaf: leaf, self.base_optimizer.state_dict())
        return copy

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state dict of this or of the base optimizer."""
        self.base_optimizer.load_state_dict(state_dict)


@functools.cache
def _named_after(proxy: type[OptimizerProxy], base: type[Optimizer]) -> type[OptimizerProxy]:
    # Composer keys an optimizer's state by its class's __qualname__: a checkpoint of the one continues under
    # the other.
    return type(base.__name__, (proxy,), {"__qualname__": base.__qualname__, "__doc__": base.__doc__})
