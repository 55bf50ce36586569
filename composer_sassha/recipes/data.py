"""The data sets a recipe can name. To add one: write a dataclass, and add a line to `DATASETS`.

`build` returns what the Trainer needs: a loader for training, and an `Evaluator` named after the held-out
part. Shuffling uses Composer's sampler, which a resumed run can put back exactly where it was.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from composer import Evaluator
from composer.utils import dist
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset, default_collate

from composer_sassha.recipes.schema import at_least, checked, one_of

_SPLIT_SEED = 0  # the split belongs to the data set: it must not move with the seed of a run


@dataclass
class Digits:
    """scikit-learn's handwritten digits: 1797 grey images of 8x8 pixels in 10 classes, part of that package.

    A fifth, stratified, is the test split. Hyperparameters are chosen on the validation split, a stratified
    fifth of what is left; `evaluate_on="validation"` trains without it and never looks at the test split.

    Args:
        batch_size: images per step over all ranks together.
        evaluate_on: the held-out part, `test` or `validation`.
        shift: training images are moved at random by up to this many pixels in each direction.
    """

    batch_size: int = checked(128, at_least(1))
    evaluate_on: str = checked("test", one_of("test", "validation"))
    shift: int = checked(0, at_least(0))

    def build(self, seed: int) -> tuple[DataLoader, Evaluator]:
        train, heldout = self.splits()
        collate = _Shift(self.shift, background=float(train.tensors[0].min())) if self.shift else None
        return (
            _train_loader(train, self.batch_size, seed, collate),
            Evaluator(label=self.evaluate_on, dataloader=_eval_loader(heldout)),
        )

    def splits(self) -> tuple[TensorDataset, TensorDataset]:
        """The training and the held-out images, standardised by the mean and deviation of the former."""
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split

        pixels, labels = load_digits(return_X_y=True)
        index, heldout = train_test_split(
            range(len(labels)), test_size=0.2, stratify=labels, random_state=_SPLIT_SEED
        )
        if self.evaluate_on == "validation":
            index, heldout = train_test_split(
                index, test_size=0.2, stratify=labels[index], random_state=_SPLIT_SEED
            )
        images = torch.tensor(pixels, dtype=torch.float32).reshape(-1, 1, 8, 8)
        images = (images - images[index].mean()) / images[index].std()
        targets = torch.tensor(labels)
        return TensorDataset(images[index], targets[index]), TensorDataset(images[heldout], targets[heldout])


def _train_loader(
    dataset: TensorDataset, batch_size: int, seed: int, collate: Callable[[list], Any] | None
) -> DataLoader:
    """Loads this rank's share of each shuffled batch of `batch_size`; the last, incomplete one is dropped."""
    ranks = dist.get_world_size()
    if batch_size % ranks:
        raise ValueError(f"batch_size={batch_size} cannot be divided by {ranks} ranks")
    if batch_size > len(dataset):
        raise ValueError(f"batch_size={batch_size} is larger than the training split ({len(dataset)})")
    sampler = dist.get_sampler(dataset, drop_last=True, shuffle=True, seed=seed)
    return DataLoader(dataset, batch_size // ranks, sampler=sampler, drop_last=True, collate_fn=collate)


def _eval_loader(dataset: TensorDataset) -> DataLoader:
    """Loads this rank's share in one batch: the data is small."""
    sampler = dist.get_sampler(dataset)
    return DataLoader(dataset, batch_size=len(sampler), sampler=sampler)


@dataclass
class _Shift:
    """Collates a batch and moves every image at random, by up to `pixels` each way.

    It draws from torch's global generator in this process, whose state is part of a checkpoint: a resumed run
    draws the same shifts.
    """

    pixels: int
    background: float

    def __call__(self, samples: list[tuple[Tensor, Tensor]]) -> list[Tensor]:
        images, labels = default_collate(samples)
        count, _, height, width = images.shape
        views = (
            F.pad(images, [self.pixels] * 4, value=self.background).unfold(2, height, 1).unfold(3, width, 1)
        )
        down, right = torch.randint(2 * self.pixels + 1, (2, count))
        return [views[torch.arange(count), :, down, right], labels]


DATASETS: dict[str, type] = {"digits": Digits}
