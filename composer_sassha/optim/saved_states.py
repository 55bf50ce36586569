"""Whether a saved state is one that an update rule with a Hessian diagonal can continue from."""

from collections.abc import Iterable, Iterator
from itertools import chain
from typing import Any

from torch import Tensor

# What shows, in a parameter group, that it can be one of these optimizers'.
_HYPERPARAMETERS = {"lr", "betas", "eps"}


def saved_states(
    state_dict: dict[str, Any], params: Iterable[Tensor]
) -> Iterator[tuple[Any, Tensor, dict[str, Any]]]:
    """Yield the key, this optimizer's parameter and the state for every saved state that is not empty."""
    keys = chain.from_iterable(group["params"] for group in state_dict["param_groups"])
    # Not strict: if the numbers differ, torch refuses the state dict with a message of its own.
    for key, p in zip(keys, params):  # noqa: B905
        if state := state_dict["state"].get(key):
            yield key, p, state


def check_state_dict(
    owner: str, state_dict: dict[str, Any], params: Iterable[Tensor], names: set[str], averages: set[str]
) -> None:
    """Raise ValueError, in one line, if a state dict is another optimizer's or for another model.

    Args:
        owner: the optimizer's name.
        state_dict: what it would load.
        params: its parameters.
        names: the entries of a parameter's state.
        averages: those of them that have the parameter's shape.
    """
    advice = "load the weights alone (in a Trainer: load_weights_only=True)"
    for group in state_dict["param_groups"]:
        if lacking := sorted(_HYPERPARAMETERS - {*group}):
            raise ValueError(
                f"{owner}: the parameter groups of this state have no {', '.join(lacking)}, so that it "
                f"is not one of composer_sassha's; {advice}"
            )
    for key, p, state in saved_states(state_dict, params):
        if lacking := sorted(names - {*state}):
            raise ValueError(
                f"{owner}: parameter {key} of this state has no {', '.join(lacking)}, but "
                f"{', '.join(map(str, state))}, so that it is not one of composer_sassha's; {advice}"
            )
        for name in sorted(averages):
            if (shape := state[name].shape) != p.shape:
                raise ValueError(
                    f"{owner}: {name} of parameter {key} of this state has shape {tuple(shape)}, and the "
                    f"parameter {tuple(p.shape)}; build the model as it was, or {advice}"
                )
