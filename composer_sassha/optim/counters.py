"""The counters that a checkpoint keeps, in the optimizer's parameter groups."""

from typing import Any, Protocol

# Steps taken; the step of the last successful Hessian refresh (-1: none) and the number of refreshes; with
# float16 the scale of the loss whose Hessian is estimated, and the refreshes since it last changed.
COUNTERS: dict[str, int | float] = {
    "steps_taken": 0,
    "last_refresh": -1,
    "refreshes": 0,
    "hessian_scale": 1024.0,
    "hessian_scale_age": 0,
}


class _HasGroups(Protocol):
    @property
    def param_groups(self) -> list[dict[str, Any]]: ...


class Counters:
    """Reads and writes the counters; every group has all of them, so that any can be loaded anywhere.

    Args:
        optimizer: has the groups, which loading a state dict replaces.
    """

    def __init__(self, optimizer: _HasGroups) -> None:
        self._optimizer = optimizer
        self.fill()

    def fill(self) -> None:
        """Give the counters to groups that lack them, from one that has them or at their start."""
        groups = self._optimizer.param_groups
        if all(COUNTERS.keys() <= group.keys() for group in groups):
            return
        for name in COUNTERS:
            value = self[name]
            for group in groups:
                group.setdefault(name, value)

    def __getitem__(self, name: str) -> Any:
        groups = self._optimizer.param_groups
        return next((group[name] for group in groups if name in group), COUNTERS[name])

    def update(self, **values: int | float) -> None:
        """Set counters in all groups."""
        for group in self._optimizer.param_groups:
            group.update(values)
