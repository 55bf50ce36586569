"""Count the kernels that a step launches on a GPU, and how often the processor waits for it."""

from collections.abc import Iterable
from typing import Any, NamedTuple

from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from composer_sassha.benchmark.steps import Kind, Stepper

_WAITS = ("cudaDeviceSynchronize", "cudaStreamSynchronize", "cudaEventSynchronize")
_COPIES = ("Memcpy", "Memset")


class Launches(NamedTuple):
    """Kernels that were launched, and waits for the device."""

    kernels: int
    waits: int


def launches(stepper: Stepper, kind: Kind) -> Launches:
    """Count what a step launches and waits for, the start of `fit()` and the profiler's own wait included.

    Args:
        stepper: on a GPU, warmed up.
        kind: of the step.
    """
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA], acc_events=True) as profiled:
        stepper.take(kind)
    return counted(profiled.events())


def counted(events: Iterable[Any]) -> Launches:
    """Count kernels and waits among a profiler's events.

    Args:
        events: with `name`, `device_type` and `is_user_annotation`, which marks the shadow of a name on the
            device.
    """
    found = [(event.name, event.device_type) for event in events if not event.is_user_annotation]
    kernels = sum(device == DeviceType.CUDA and not name.startswith(_COPIES) for name, device in found)
    return Launches(kernels, sum(name in _WAITS for name, _ in found))
