"""Whether an optimizer keeps a momentum, found by trying it on one small parameter."""

import copy
import inspect
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer
from torch.utils._pytree import tree_leaves, tree_map

NAMES = ("exp_avg", "momentum_buffer")


def momentum_of(state: Mapping[str, Any]) -> Tensor | None:
    """Return the momentum that an optimizer keeps in a parameter's state, or None.

    Example:
        >>> momentum_of({"step": 1, "exp_avg": torch.tensor([2.0])})
        tensor([2.])
    """
    return next((state[name] for name in NAMES if isinstance(state.get(name), Tensor)), None)


def will_keep_momentum(optimizer: Optimizer) -> bool:
    """Whether every group with a trained parameter will have a momentum once the optimizer has stepped.

    The names of the hyperparameters do not show it: some optimizers with `betas` keep none, and Adafactor
    keeps one if `beta1` is set. So a copy of the optimizer steps one parameter of one entry for each group,
    at lr = 0 with a zero gradient, as PyTorch steps a fresh optimizer to create its state. An optimizer that
    cannot be copied or stepped like this counts as one with momentum; MSAM then refuses it in the second
    step, by its state.

    Example:
        >>> w = torch.nn.Parameter(torch.ones(2))
        >>> will_keep_momentum(torch.optim.SGD([w])), will_keep_momentum(torch.optim.Adam([w]))
        (False, True)
    """
    own = {name: value for name, value in vars(optimizer).items() if name not in ("param_groups", "state")}
    if any(isinstance(leaf, (Optimizer, Parameter)) for leaf in tree_leaves(own)):
        return True  # its copy would step the real parameters through these
    try:
        return all(momentum_of(state) is not None for state in _states_after_a_step(optimizer, own))
    except Exception:  # an optimizer of any origin, on a parameter that it was not made for
        return True


@torch.no_grad()
def _states_after_a_step(optimizer: Optimizer, own: dict[str, Any]) -> list[Mapping[str, Any]]:
    # Some constructors make state: for parameters (Adagrad), or under a string, such as a counter (MADGRAD).
    state = {key: copy.deepcopy(kept) for key, kept in optimizer.state.items() if not isinstance(key, Tensor)}
    groups: list[dict[str, Any]] = []
    for group in optimizer.param_groups:
        for p in [p for p in group["params"] if p.requires_grad][:1]:
            small = Parameter(_of_one_entry(p, p))
            small.grad = torch.zeros_like(small)
            if p in optimizer.state:
                state[small] = _of_one_entry(optimizer.state[p], p)
            settings = {name: copy.deepcopy(value) for name, value in group.items() if name != "params"}
            if "lr" in group:
                settings["lr"] = torch.zeros_like(group["lr"]) if isinstance(group["lr"], Tensor) else 0.0
            groups.append({**settings, "params": [small]})
    twin = object.__new__(type(optimizer))  # the constructor may take other arguments
    own = tree_map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, own)
    own |= {"_optimizer_step_pre_hooks": {}, "_optimizer_step_post_hooks": {}}
    vars(twin).update(own, param_groups=groups, state=defaultdict(dict, state))
    devices = {group["params"][0].device for group in groups if group["params"][0].is_cuda}
    with torch.random.fork_rng(devices):
        inspect.unwrap(type(optimizer).step)(twin)  # without the hooks around every optimizer's step
    return [twin.state[group["params"][0]] for group in groups]


def _of_one_entry(value: Any, p: Tensor) -> Any:
    """Copy a parameter or its state, with one entry in place of all of the parameter's."""
    if isinstance(value, dict):
        return {name: _of_one_entry(each, p) for name, each in value.items()}
    if isinstance(value, Tensor) and value.shape == p.shape:
        return torch.zeros([1] * p.ndim, dtype=value.dtype, device=value.device)
    return copy.deepcopy(value)
