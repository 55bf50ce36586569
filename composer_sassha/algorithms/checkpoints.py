"""Checkpoints of one method, continued with another one."""

from typing import Any

from composer_sassha.optim.counters import COUNTERS
from composer_sassha.perturbations import LookSAMPerturbation

OWN_STATE = (LookSAMPerturbation.remembers,)


def ignore_own_entries(state_dict: dict[str, Any]) -> None:
    """Drop this package's entries from the optimizer state of a checkpoint; for `load_ignore_keys`.

    With sharded training (FSDP), PyTorch loads a checkpoint only if its state entries are exactly those of
    the optimizer. With `Trainer(load_path=..., load_ignore_keys=ignore_own_entries)` a checkpoint of plain
    SGD continues under SAM, or one of LookSAM under plain SGD. The step counters then start at 0. Do not use
    it without sharding, or to resume the same method.

    Args:
        state_dict: the state dict that the Trainer loads; changed in place.

    Example:
        >>> group = {"lr": 0.1, "params": ["weight"], "steps_taken": 7}
        >>> state_dict = {"state": {"optimizers": {"SGD": {"param_groups": [group], "state": {}}}}}
        >>> ignore_own_entries(state_dict)
        >>> group
        {'lr': 0.1, 'params': ['weight']}
    """
    optimizers = (state_dict.get("state") or {}).get("optimizers")  # None where only rank 0 has loaded them
    for optimizer in (optimizers or {}).values():
        for group in optimizer["param_groups"]:
            for name in COUNTERS:
                group.pop(name, None)
        for state in optimizer["state"].values():
            for name in OWN_STATE:
                state.pop(name, None)
