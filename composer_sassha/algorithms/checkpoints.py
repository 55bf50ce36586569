"""Checkpoints that one method has written and another one continues."""

from typing import Any

from composer_sassha.optim.sharpness_aware import COUNTERS
from composer_sassha.perturbations import LookSAMPerturbation

OWN_STATE = (LookSAMPerturbation.remembers,)


def ignore_own_entries(state_dict: dict[str, Any]) -> None:
    """Leave out of a checkpoint what this package has added to an optimizer's state: for `load_ignore_keys`.

    With sharded training (FSDP), PyTorch loads a checkpoint only where it has the very entries of the
    optimizer that it is loaded into. One of plain SGD then continues under SAM, or one of LookSAM under plain
    SGD, with `Trainer(load_path=..., load_ignore_keys=ignore_own_entries)`; the counters of steps start at 0.
    Without sharding, and to resume the same method, leave it out.

    Args:
        state_dict: what the Trainer loads; changed in place.

    Example:
        >>> group = {"lr": 0.1, "params": ["weight"], "steps_taken": 7}
        >>> state_dict = {"state": {"optimizers": {"SGD": {"param_groups": [group], "state": {}}}}}
        >>> ignore_own_entries(state_dict)
        >>> group
        {'lr': 0.1, 'params': ['weight']}
    """
    optimizers = (state_dict.get("state") or {}).get("optimizers")  # None where rank 0 alone has loaded them
    for optimizer in (optimizers or {}).values():
        for group in optimizer["param_groups"]:
            for name in COUNTERS:
                group.pop(name, None)
        for state in optimizer["state"].values():
            for name in OWN_STATE:
                state.pop(name, None)
