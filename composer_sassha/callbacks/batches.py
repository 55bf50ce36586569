"""Batches to measure on, taken once from a loader."""

import sys
from itertools import islice
from typing import Any

from composer.core import DataSpec
from composer.devices import Device
from torch.utils.data import DistributedSampler

from composer_sassha.algorithms.given import samples_of
from composer_sassha.common.batches import Indivisible
from composer_sassha.common.validate import SettingError


def take(data: DataSpec, batches: int | None, device: Device) -> list[tuple[Any, int]]:
    """Return the first batches of a loader, on the device, each with its number of samples.

    Samples that a `DistributedSampler` repeats, so that all ranks have equally many, are left out. A rank
    that has only such samples takes one batch with a count of 0: it must take part in the collectives of the
    measurement.

    Args:
        data: the loader.
        batches: the largest number of batches; None: all.
        device: the Trainer's device.

    Raises:
        SettingError: the samples of a batch cannot be counted, or the repeated ones not left out.
    """
    taken: list[tuple[Any, int]] = []
    samples = samples_of(data)
    left = _own(data.dataloader)
    for batch in islice(iter(data.dataloader), batches):
        batch = data.microbatch_transforms(device.batch_to_device(data.batch_transforms(batch)))
        try:
            count = samples.count(batch)
            if count < 1 or count != int(count):
                raise Indivisible(f"their number is {count}")
            own = min(int(count), left)
            batch = samples.first(batch, own or int(count), count)
        except Indivisible as error:
            raise SettingError(
                f"sharpness: the samples of a batch cannot be counted or cut: {error}; give the loader a "
                "DataSpec with get_num_samples_in_batch and split_batch"
            ) from error
        left -= own
        if own or not taken:
            taken.append((batch, own))
    return taken


def _own(loader: Any) -> int:
    """Return the number of a loader's samples on this rank that are no repetitions."""
    sampler = getattr(loader, "sampler", None)
    # Without a batch size, the items of the data set are batches already, with any number of samples.
    if isinstance(sampler, DistributedSampler) and loader.batch_size is not None:
        return len(range(sampler.rank, len(sampler.dataset), sampler.num_replicas))  # type: ignore[arg-type]
    return sys.maxsize
