"""Measure peak memory: ask the allocator on a GPU, add up its records on a CPU."""

import contextlib
import gc
from collections.abc import Hashable, Iterator
from types import TracebackType
from typing import Any, NamedTuple

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from composer_sassha.benchmark.steps import Kind, stepper_of
from composer_sassha.recipes.config import Recipe

_MARK = "composer_sassha.memory:"


class Memory:
    """Context that finds the peak of the memory allocated since its start, in each of its watched parts.

    On a CPU it counts PyTorch's own allocations, without the scratch memory of libraries.

    Args:
        device: "cpu" or "gpu".

    >>> with Memory("cpu") as memory:
    ...     kept = torch.zeros(1000)
    ...     with memory.watched("both"):
    ...         dropped = torch.zeros(5000)
    ...         del dropped
    >>> memory.peaks
    {'both': 24000}
    """

    def __init__(self, device: str) -> None:
        self.peaks: dict[Any, int] = {}  # bytes more than at the start
        self._on_gpu = device == "gpu"

    def __enter__(self) -> "Memory":
        gc.collect()
        if self._on_gpu:
            torch.cuda.synchronize()
            self._start = torch.cuda.memory_allocated()
        else:
            self._profile = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
            self._profile.__enter__()
        return self

    @contextlib.contextmanager
    def watched(self, name: Hashable) -> Iterator[None]:
        """Find the peak of this part.

        Args:
            name: key in `peaks`, which is complete once the `Memory` has ended.
        """
        self.peaks[name] = 0
        if self._on_gpu:
            torch.cuda.reset_peak_memory_stats()
            yield
            self.peaks[name] = torch.cuda.max_memory_allocated() - self._start
        else:
            with record_function(f"{_MARK}{len(self.peaks) - 1}"):
                yield

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._on_gpu:
            return
        self._profile.__exit__(kind, error, trace)
        # Only blocks from after the start count: the size of an older one is unknown when it is freed.
        now, names, parts = 0, [*self.peaks], []
        events = sorted(self._profile.profiler.kineto_results.events(), key=lambda e: e.start_ns())  # type: ignore[union-attr]
        for event in events:
            if event.name().startswith(_MARK):
                end = event.start_ns() + event.duration_ns()
                parts.append((names[int(event.name().removeprefix(_MARK))], end))
            elif event.name() == "[memory]":
                now += event.nbytes()
            for name, end in parts:
                if event.start_ns() <= end:
                    self.peaks[name] = max(self.peaks[name], now)


class Peaks(NamedTuple):
    """The peak of each kind of step in bytes, and whether a refresh estimates on the whole batch."""

    kinds: dict[Kind, int]
    whole: bool


def peaks(recipe: Recipe, device: str) -> Peaks:
    """Return the peak of each kind of step, with parameters, optimizer state and gradients.

    Args:
        recipe: with the method.
        device: "cpu" or "gpu".
    """
    with Memory(device) as memory:
        stepper = stepper_of(recipe, device=device)
        try:
            for kind in stepper.schedule:  # allocates the optimizer's state
                stepper.take(kind)
            for kind in stepper.schedule:
                with memory.watched(kind):
                    stepper.take(kind)
        finally:
            stepper.close()
    curvature = getattr(stepper.optimizer, "curvature", None)
    return Peaks(memory.peaks, whole=curvature is None or curvature.batch_fraction == 1)
