"""A copy of all that one pass changes besides the gradients: random number generators and the model."""

import contextlib
import random
from collections.abc import Iterable, Iterator

import numpy as np
import torch
from torch import Tensor

from composer_sassha.common.side_effects import SideEffects


class Snapshot:
    """Copies the RNG states and what a model keeps, so that a second pass can start from the same.

    Args:
        effects: of the model; None keeps the RNG states only.
        devices: the CUDA devices whose generators are kept.
        trained, start, learn: see `SideEffects.take`.
    """

    def __init__(
        self,
        effects: SideEffects | None,
        devices: set[torch.device],
        trained: Iterable[Tensor] | None = None,
        start: bool = False,
        learn: bool = True,
    ) -> None:
        self._python = random.getstate()
        self._numpy = np.random.get_state()  # noqa: NPY002 - data augmentations use the global generator
        self._torch = torch.get_rng_state()
        self._cuda = {device: torch.cuda.get_rng_state(device) for device in devices if device.type == "cuda"}
        self._effects, self._trained = effects, None if trained is None else list(trained)
        self._seen = None if effects is None else effects.take(self._trained, start, learn)

    def restore(self) -> None:
        """Restore the RNG states and the model to what they were."""
        random.setstate(self._python)
        np.random.set_state(self._numpy)  # noqa: NPY002
        torch.set_rng_state(self._torch)
        for device, state in self._cuda.items():
            torch.cuda.set_rng_state(state, device)
        if self._effects is not None and self._seen is not None:
            self._effects.restore(self._seen)

    @contextlib.contextmanager
    def again(self) -> Iterator[None]:
        """Go back to this moment for a second evaluation; all is as before when the block ends.

        A graph of the first evaluation may have saved tensors that this writes to. Its backward would refuse
        a new version of them, although it finds the old values: their versions are set back too.
        """
        after = Snapshot(self._effects, set(self._cuda), self._trained)
        tensors = [] if self._effects is None or self._seen is None else self._effects.tensors(self._seen)
        try:
            with contextlib.ExitStack() as unnoticed:
                for tensor in tensors:
                    unnoticed.enter_context(torch.autograd._unsafe_preserve_version_counter(tensor))
                self.restore()
                try:
                    yield
                finally:
                    after.restore()
        finally:
            if self._effects is not None and after._seen is not None:
                self._effects.settle(after._seen)
