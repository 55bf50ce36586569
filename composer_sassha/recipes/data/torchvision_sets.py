"""The data sets that torchvision reads, and downloads on request."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock, Timeout
from torchvision import datasets

from composer_sassha.recipes.data.images import InMemoryImages, Split
from composer_sassha.recipes.data.loading import data_root

_PATIENCE = 1800.0  # seconds that another process may take to download


@dataclass
class TorchvisionImages(InMemoryImages):
    """A data set of torchvision; the other arguments are those of `InMemoryImages`.

    Args:
        root: the folder with its files.
        download: get them where they are missing.
    """

    root: str = "~/data"
    download: bool = False

    def read(self) -> tuple[Split, Split]:
        """Read both splits.

        Raises:
            ValueError: the data set is missing; the message has how to get it.
        """
        root = data_root(self.root)
        try:
            with _downloading(root) if self.download else nullcontext():
                return self.split(str(root), train=True), self.split(str(root), train=False)
        except RuntimeError as error:
            raise ValueError(
                f"root={self.root}: {type(self).__name__} is not there, or damaged; add data.download=true "
                "to get it, or set data.root to where it is"
            ) from error
        except Timeout as error:
            raise ValueError(
                f"root={self.root}: another process has held {error.lock_file} for {_PATIENCE / 60:.0f} "
                "minutes; wait until it has downloaded, or end it and delete that file"
            ) from error
        except OSError as error:
            raise ValueError(f"root={self.root}: {type(self).__name__} cannot be had: {error}") from error

    def split(self, root: str, train: bool) -> Split:
        """Return the training or the test split."""
        raise NotImplementedError


@contextmanager
def _downloading(root: Path) -> Iterator[None]:
    """Let one process download while the others wait for its files."""
    root.mkdir(parents=True, exist_ok=True)
    tempfile.TemporaryFile(dir=root).close()  # where no file can be made, a lock would be waited for in vain
    with FileLock(root / ".download.lock", timeout=_PATIENCE):
        yield


@dataclass
class CIFAR10(TorchvisionImages):
    """60,000 photographs of 32x32 pixels in 10 classes (Krizhevsky 2009); 10,000 are the test split."""

    def split(self, root: str, train: bool) -> Split:
        """Return the training or the test split."""
        found = datasets.CIFAR10(root, train, download=self.download)
        return Split(torch.from_numpy(found.data).permute(0, 3, 1, 2), torch.tensor(found.targets))


@dataclass
class CIFAR100(TorchvisionImages):
    """60,000 photographs of 32x32 pixels in 100 classes (Krizhevsky 2009); 10,000 are the test split."""

    def split(self, root: str, train: bool) -> Split:
        """Return the training or the test split."""
        found = datasets.CIFAR100(root, train, download=self.download)
        return Split(torch.from_numpy(found.data).permute(0, 3, 1, 2), torch.tensor(found.targets))


@dataclass
class MNIST(TorchvisionImages):
    """70,000 grey handwritten digits of 28x28 pixels (LeCun et al. 1998); 10,000 are the test split."""

    flip: bool = False  # a mirrored digit is none

    def split(self, root: str, train: bool) -> Split:
        """Return the training or the test split."""
        found = datasets.MNIST(root, train, download=self.download)
        return Split(found.data[:, None], found.targets)


@dataclass
class FashionMNIST(TorchvisionImages):
    """70,000 grey pictures of clothes, 28x28 pixels, in 10 classes (Xiao et al. 2017); 10,000 to test."""

    def split(self, root: str, train: bool) -> Split:
        """Return the training or the test split."""
        found = datasets.FashionMNIST(root, train, download=self.download)
        return Split(found.data[:, None], found.targets)


@dataclass
class SVHN(TorchvisionImages):
    """99,289 house numbers, 32x32 pixels around one digit (Netzer et al. 2011); 26,032 are the test split.

    Needs SciPy.
    """

    flip: bool = False  # a mirrored digit is none

    def split(self, root: str, train: bool) -> Split:
        """Return the training or the test split."""
        found = datasets.SVHN(root, "train" if train else "test", download=self.download)
        return Split(torch.from_numpy(found.data), torch.from_numpy(found.labels.astype(np.int64)))
