"""Loaders that divide the batch among the ranks, and the validation split.

Shuffling uses Composer's sampler, which a resumed run can put back exactly where it was.
"""

from collections.abc import Callable, Sized
from pathlib import Path
from typing import Any

import torch
from composer.utils import dist
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

SPLIT_SEED = 0  # the split belongs to the data set: it must not move with the seed of a run


def data_root(root: str) -> Path:
    """Return the folder that a `root` in a recipe means; an unknown user's home is a ValueError.

    >>> data_root("/data/cifar").as_posix()
    '/data/cifar'
    """
    try:
        return Path(root).expanduser()
    except RuntimeError as error:
        raise ValueError(f"root={root}: {error}") from error


def rank_share(batch_size: int, dataset: Sized) -> int:
    """Return the size of this rank's part of a batch; an impossible batch size is a ValueError."""
    ranks = dist.get_world_size()
    if batch_size % ranks:
        raise ValueError(f"batch_size={batch_size} cannot be divided by {ranks} ranks")
    if batch_size > len(dataset):
        raise ValueError(f"batch_size={batch_size} is larger than the training split ({len(dataset)})")
    return batch_size // ranks


def train_loader(
    dataset: Dataset, batch_size: int, seed: int, collate: Callable[[Any], Any] | None = None, **settings: Any
) -> DataLoader:
    """Load this rank's part of each shuffled batch of `batch_size`; drop the last, incomplete batch.

    Args:
        dataset: the training split.
        batch_size: samples over all ranks together.
        seed: of the order.
        collate: makes a batch of what the data set returns.
        settings: more arguments of the `DataLoader`.

    Raises:
        ValueError: `batch_size` cannot be divided by the number of ranks, or is larger than the split.
    """
    size = rank_share(batch_size, dataset)  # type: ignore[arg-type]  # all of ours have a length
    sampler = dist.get_sampler(dataset, drop_last=True, shuffle=True, seed=seed)
    return DataLoader(dataset, size, sampler=sampler, drop_last=True, collate_fn=collate, **settings)


def eval_loader(
    dataset: Dataset,
    batch_size: int | None = None,
    collate: Callable[[Any], Any] | None = None,
    **settings: Any,
) -> DataLoader:
    """Load this rank's part in its order, in batches of `batch_size`; None: in one batch.

    Args:
        dataset: the held-out split.
        batch_size: samples on this rank.
        collate: makes a batch of what the data set returns.
        settings: more arguments of the `DataLoader`.
    """
    sampler = dist.get_sampler(dataset)
    return DataLoader(dataset, batch_size or len(sampler), sampler=sampler, collate_fn=collate, **settings)


def hold_out(labels: Tensor, fraction: float = 0.1) -> tuple[Tensor, Tensor]:
    """Split off a part of every class: the indices that stay, and those held out, each in ascending order.

    Args:
        labels: the class of each sample.
        fraction: of each class, in (0, 1).

    >>> [part.tolist() for part in hold_out(torch.tensor([0, 1, 0, 1]), fraction=0.5)]
    [[2, 3], [0, 1]]
    """
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(SPLIT_SEED))
    heldout = torch.zeros(len(labels), dtype=torch.bool)
    for label in labels.unique():
        members = order[labels[order] == label]
        heldout[members[: round(fraction * len(members))]] = True
    return (~heldout).nonzero().flatten(), heldout.nonzero().flatten()


def subset(samples: int, size: int) -> Tensor:
    """Return the positions of a fixed part of `size` samples, in ascending order.

    Raises:
        ValueError: there are fewer.

    >>> subset(samples=10, size=10).tolist()
    [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]
    """
    if size > samples:
        raise ValueError(f"train_size={size} is larger than the training split ({samples})")
    order = torch.randperm(samples, generator=torch.Generator().manual_seed(SPLIT_SEED))
    return order[:size].sort().values
