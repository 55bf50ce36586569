"""Small images: held in memory as one tensor, and augmented a batch at a time."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
import torch.nn.functional as F
from composer import Evaluator
from composer.devices import Device
from composer.utils import get_device
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset
from torchvision.transforms import v2

from composer_sassha.recipes.data.loading import eval_loader, hold_out, rank_share, subset, train_loader
from composer_sassha.recipes.errors import did_you_mean
from composer_sassha.recipes.schema import at_least, checked, fraction, one_of, within

_POLICIES = {policy.value: policy for policy in v2.AutoAugmentPolicy}


def _check_policy(policy: str | None) -> None:
    if policy is not None and policy not in _POLICIES:
        raise ValueError(f"must be one of {', '.join(_POLICIES)}, or null{did_you_mean(policy, _POLICIES)}")


def _check_size(size: int | None) -> None:
    if size is not None and size < 1:
        raise ValueError("must be at least 1, or null")


class Split(NamedTuple):
    """Images as read: `images` are uint8, (count, channels, height, width), `labels` int64."""

    images: Tensor
    labels: Tensor

    def at(self, index: Tensor) -> "Split":
        """Return the images at these positions."""
        return Split(self.images[index], self.labels[index])


@dataclass
class InMemoryImages:
    """Base of the data sets of small images that a recipe can name.

    A training image is padded with black and cropped to its size again at random, mirrored at random, and
    standardised by the mean and deviation of each channel over the training split. The random numbers come
    from torch's global generator in this process, whose state is part of a checkpoint: a resumed run draws
    the same.

    Args:
        batch_size: images per step over all ranks together, >= 1.
        evaluate_on: `test`, or `validation`: a tenth of every class, held out of the training split. The
            test split is then not looked at.
        padding: pixels of black around a training image before it is cropped, >= 0.
        flip: mirror half of the training images from left to right.
        cutout: side of the square that is cut out of training images (DeVries and Taylor 2017), >= 0.
        cutout_share: fraction of the training images that it is cut out of, in (0, 1].
        auto_augment: AutoAugment's policy (Cubuk et al. 2019): cifar10, svhn or imagenet; None: no policy.
            It is applied image by image on the CPU, which takes most of a millisecond for each.
        label_noise: fraction of the training labels that are drawn anew from all classes, in [0, 1). The
            held-out images keep theirs, those of the validation split as well.
        noise_seed: seed of the noise, independent of the seed of a run.
        train_size: images to train on, >= 1, the same ones in every run; None: the whole training split.
        image_size: pixels on a side that all images are scaled to when they are read, >= 1; None: as they
            are. Half the size is a quarter of the computation.
    """

    batch_size: int = checked(256, at_least(1))
    evaluate_on: str = checked("test", one_of("test", "validation"))
    padding: int = checked(4, at_least(0))
    flip: bool = True
    cutout: int = checked(0, at_least(0))
    cutout_share: float = checked(1.0, fraction)
    auto_augment: str | None = checked(None, _check_policy)
    label_noise: float = checked(0.0, within(0, 1))
    noise_seed: int = checked(0, within(0, 2**32))
    train_size: int | None = checked(None, _check_size)
    image_size: int | None = checked(None, _check_size)

    def read(self) -> tuple[Split, Split]:
        """Return the training and the test split, as they are on the disk."""
        raise NotImplementedError

    def build(self, seed: int) -> tuple[DataLoader, Evaluator]:
        """Return a loader for training and the evaluator of the held-out split."""
        train, heldout = self.splits()
        policy = v2.AutoAugment(_POLICIES[self.auto_augment]) if self.auto_augment else None
        mean, std = channel_statistics(train.images)
        augment = Augment(mean, std, self.padding, self.flip, self.cutout, self.cutout_share, policy)
        size = rank_share(self.batch_size, train.labels)  # what fits in training fits in an evaluation
        evaluation = eval_loader(_Batches(*heldout), size, Augment(mean, std))
        return (
            train_loader(_Batches(*train), self.batch_size, seed, augment),
            Evaluator(label=self.evaluate_on, dataloader=evaluation),
        )

    def splits(self) -> tuple[Split, Split]:
        """Return the images to train on, with noise in their labels, and those held out."""
        train, heldout = self.read()
        classes = int(train.labels.max()) + 1
        if self.evaluate_on == "validation":
            stay, out = hold_out(train.labels)
            train, heldout = train.at(stay), train.at(out)
        if self.train_size is not None:
            train = train.at(subset(len(train.labels), self.train_size))
        noisy = with_label_noise(train.labels, classes, self.label_noise, self.noise_seed)
        train = Split(train.images, noisy)
        return (train, heldout) if self.image_size is None else (self._scaled(train), self._scaled(heldout))

    def _scaled(self, split: Split) -> Split:
        size = [self.image_size, self.image_size]
        return Split(v2.functional.resize(split.images, size, antialias=True), split.labels)


class _Batches(TensorDataset):
    """Takes all samples of a batch at once."""

    def __getitems__(self, indices: list[int]) -> tuple[Tensor, ...]:
        return self[indices]


def with_label_noise(labels: Tensor, classes: int, rate: float, seed: int) -> Tensor:
    """Draw a fraction of the labels anew from all classes (symmetric noise); some stay the same.

    Args:
        labels: the true ones.
        classes: how many there are.
        rate: fraction of the labels that is drawn anew, rounded down to a number of labels.
        seed: which labels, and what they become.

    >>> with_label_noise(torch.zeros(8, dtype=torch.int64), classes=10, rate=0.5, seed=0)
    tensor([...])
    """
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randperm(len(labels), generator=generator)[: int(rate * len(labels))]
    return labels.index_copy(0, drawn, torch.randint(classes, (len(drawn),), generator=generator))


def channel_statistics(images: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean and the deviation of each channel of uint8 images, on a scale from 0 to 1.

    >>> channel_statistics(torch.tensor([0, 255], dtype=torch.uint8).view(2, 1, 1, 1))
    (tensor([0.5000]), tensor([0.5000]))
    """
    levels = torch.arange(256, dtype=torch.float64) / 255
    # Counting the levels is exact, and needs no copy of the images in another type.
    counts = torch.stack([torch.bincount(channel.flatten(), minlength=256) for channel in images.unbind(1)])
    weights = counts / counts.sum(1, keepdim=True, dtype=torch.float64)
    mean = weights @ levels
    std = (weights @ levels**2 - mean**2).clamp_min(0).sqrt()
    return mean.float(), std.float()


@dataclass
class Augment:
    """Makes a batch of uint8 images and their labels ready: moves it to the device, augments, standardises.

    torchvision's random transforms draw once for a whole batch, so cropping and mirroring are written out.
    All numbers are drawn on the CPU: every device sees the same augmentations.

    Args:
        mean: of each channel, on a scale from 0 to 1.
        std: the deviation of each channel; 0 (a channel that is constant) counts as 1.
        padding: pixels of black around an image before it is cropped; 0: it is left in place.
        flip: mirror half of the images.
        cutout: side of the square that is replaced by the mean, its centre anywhere in the image; 0: none.
        cutout_share: fraction of the images that this is done to.
        policy: applied to every uint8 image.
        device: where the batch goes; by default the one that the Trainer takes.
    """

    mean: Tensor
    std: Tensor
    padding: int = 0
    flip: bool = False
    cutout: int = 0
    cutout_share: float = 1.0
    policy: Callable[[Tensor], Tensor] | None = None
    device: Device = field(default_factory=lambda: get_device(None))

    def __call__(self, batch: tuple[Tensor, Tensor]) -> list[Tensor]:
        """Return the batch, ready for the model."""
        # As bytes, which are a quarter of the numbers that they become. The policy works on the CPU.
        images, labels = batch if self.policy else map(self.device.tensor_to_device, batch)
        if self.padding:
            images = self._crop(images)
        if self.flip:
            mirrored = torch.rand(len(images)).lt(0.5).to(images.device)
            images = torch.where(mirrored[:, None, None, None], images.flip(3), images)
        if self.policy is not None:
            images = torch.stack([self.policy(image) for image in images])
            images, labels = map(self.device.tensor_to_device, (images, labels))
        std = torch.where(self.std > 0, self.std, 1.0)
        images = v2.functional.normalize(
            v2.functional.to_dtype(images, torch.float32, scale=True), self.mean.tolist(), std.tolist()
        )
        return [self._cut(images) if self.cutout else images, labels]

    def _crop(self, images: Tensor) -> Tensor:
        count, _, height, width = images.shape
        views = F.pad(images, [self.padding] * 4).unfold(2, height, 1).unfold(3, width, 1)
        down, right = torch.randint(2 * self.padding + 1, (2, count)).to(images.device)
        return views[torch.arange(count, device=images.device), :, down, right]

    def _cut(self, images: Tensor) -> Tensor:
        count, _, height, width = images.shape
        rows, columns = (
            _span(torch.randint(length, (count, 1)), self.cutout, length) for length in (height, width)
        )
        chosen = torch.rand(count, 1) < self.cutout_share
        square = (rows & chosen)[:, None, :, None] & columns[:, None, None, :]
        return images.masked_fill(square.to(images.device), 0.0)


def _span(centre: Tensor, side: int, length: int) -> Tensor:
    """Return which of `length` positions are within `side` of them around each centre."""
    first = centre - side // 2
    position = torch.arange(length)
    return (position >= first) & (position < first + side)
