"""scikit-learn's handwritten digits."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from composer import Evaluator
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset, default_collate

from composer_sassha.recipes.data.images import with_label_noise
from composer_sassha.recipes.data.loading import SPLIT_SEED, eval_loader, train_loader
from composer_sassha.recipes.schema import at_least, checked, one_of, within


@dataclass
class Digits:
    """scikit-learn's handwritten digits: 1797 grey images of 8x8 pixels in 10 classes, part of that package.

    A fifth, stratified, is the test split. Hyperparameters are chosen on the validation split, a stratified
    fifth of what is left; `evaluate_on="validation"` trains without it and never looks at the test split.

    Args:
        batch_size: images per step over all ranks together.
        evaluate_on: the held-out part, `test` or `validation`.
        shift: training images are moved at random by up to this many pixels in each direction.
        label_noise: fraction of the training labels that are drawn anew from all classes, in [0, 1). The
            held-out images keep theirs, those of the validation split as well.
        noise_seed: seed of the noise, independent of the seed of a run.
    """

    batch_size: int = checked(128, at_least(1))
    evaluate_on: str = checked("test", one_of("test", "validation"))
    shift: int = checked(0, at_least(0))
    label_noise: float = checked(0.0, within(0, 1))
    noise_seed: int = checked(0, within(0, 2**32))

    def build(self, seed: int) -> tuple[DataLoader, Evaluator]:
        """Return a loader for training and the evaluator of the held-out split."""
        train, heldout = self.splits()
        collate = _Shift(self.shift, background=float(train.tensors[0].min())) if self.shift else None
        return (
            train_loader(train, self.batch_size, seed, collate),
            Evaluator(label=self.evaluate_on, dataloader=eval_loader(heldout)),
        )

    def splits(self) -> tuple[TensorDataset, TensorDataset]:
        """Return the training and the held-out images, standardised by the former."""
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split

        pixels, labels = load_digits(return_X_y=True)
        index, heldout = train_test_split(
            range(len(labels)), test_size=0.2, stratify=labels, random_state=SPLIT_SEED
        )
        if self.evaluate_on == "validation":
            index, heldout = train_test_split(
                index, test_size=0.2, stratify=labels[index], random_state=SPLIT_SEED
            )
        images = torch.tensor(pixels, dtype=torch.float32).reshape(-1, 1, 8, 8)
        images = (images - images[index].mean()) / images[index].std()
        targets = torch.tensor(labels)
        noisy = with_label_noise(targets[index], 10, self.label_noise, self.noise_seed)
        return TensorDataset(images[index], noisy), TensorDataset(images[heldout], targets[heldout])


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
