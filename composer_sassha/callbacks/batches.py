"""Batches to measure on, taken from a loader once and kept."""

import sys
from itertools import islice
from typing import Any

from composer.core import DataSpec
from composer.devices import Device
from torch.utils.data import DistributedSampler

from composer_sassha.common.batches import select, size_of
from composer_sassha.common.validate import SettingError


def take(data: DataSpec, batches: int | None, device: Device) -> list[tuple[Any, int]]:
    """Take the first batches of a loader to the device, each with its number of samples.

    Without those that a `DistributedSampler` repeats to have as many on every rank. A rank that has no others
    takes a batch that counts for none, since the ranks measure together.

    Args:
        data: the loader.
        batches: at most so many; None: all.
        device: Composer's.

    Raises:
        SettingError: one has no tensor to count samples by.
    """
    taken: list[tuple[Any, int]] = []
    left = _own(data.dataloader)
    for batch in islice(iter(data.dataloader), batches):
        batch = data.microbatch_transforms(device.batch_to_device(data.batch_transforms(batch)))
        count = size_of(batch)
        if not count:
            raise SettingError("sharpness: a batch has no tensor with samples in it; use another loader")
        own = min(count, left)
        left -= own
        if 0 < own < count:
            batch = select(batch, slice(own), count)
        if own or not taken:
            taken.append((batch, own))
    return taken


def _own(loader: Any) -> int:
    """The number of a loader's samples that no other rank has."""
    sampler = getattr(loader, "sampler", None)
    # Without a batch size the items of the data set are batches, of any number of samples.
    if isinstance(sampler, DistributedSampler) and loader.batch_size is not None:
        return len(range(sampler.rank, len(sampler.dataset), sampler.num_replicas))  # type: ignore[arg-type]
    return sys.maxsize
