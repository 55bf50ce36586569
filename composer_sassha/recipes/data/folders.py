"""Images in folders named after their classes: small ones held in memory, or read as they are used."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from composer import Evaluator
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset
from torchvision import datasets
from torchvision.transforms import v2

from composer_sassha.common.rng import generator
from composer_sassha.recipes.data.images import InMemoryImages, Split
from composer_sassha.recipes.data.loading import data_root, eval_loader, hold_out, rank_share, train_loader
from composer_sassha.recipes.schema import at_least, checked, fraction, one_of

_LIMIT = 2**34  # bytes of one split in memory
_IMAGENET_MEAN, _IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def class_folders(root: str) -> tuple[datasets.ImageFolder, datasets.ImageFolder]:
    """Find the images of `root/train/<class>/`, and of `root/test/<class>/` or `root/val/<class>/`.

    Raises:
        ValueError: a folder is missing or has no images, or the two have different classes.
    """
    base = data_root(root)
    try:
        held = next((name for name in ("test", "val") if (base / name).is_dir()), None)
        if held is None or not (base / "train").is_dir():
            raise ValueError(f"root={root}: must hold train/<class>/ and test/<class>/ (or val/<class>/)")
        train, heldout = datasets.ImageFolder(str(base / "train")), datasets.ImageFolder(str(base / held))
    except OSError as error:  # not there, or not to be read
        raise ValueError(f"root={root}: {error}") from error
    if different := set(train.classes) ^ set(heldout.classes):
        raise ValueError(f"root={root}: train and {held} differ in the class {min(different)}")
    return train, heldout


@dataclass
class ImageFolder(InMemoryImages):
    """Images of one size in folders, decoded once and held in memory; see `InMemoryImages` for the rest.

    Args:
        root: the folder that holds train/<class>/ and test/<class>/, or val/<class>/, with the images.
    """

    root: str = "~/data/images"

    def read(self) -> tuple[Split, Split]:
        """Decode all images.

        Raises:
            ValueError: folders are missing, or the images are too many or of different sizes.
        """
        train, heldout = class_folders(self.root)
        size = v2.functional.get_size(train[0][0])
        return _decoded(train, size), _decoded(heldout, size)


def _decoded(folder: datasets.ImageFolder, size: list[int]) -> Split:
    shape = (len(folder), 3, *size)
    if (needed := torch.Size(shape).numel()) > _LIMIT:
        raise ValueError(
            f"{folder.root}: {len(folder)} images of {size[0]}x{size[1]} take {needed / 2**30:.0f} GiB; "
            "data.name=imagenet reads them as they are used"
        )
    images = torch.empty(shape, dtype=torch.uint8)
    for row, (path, _) in enumerate(folder.samples):
        try:
            image = folder.loader(path)
        except OSError as error:
            raise ValueError(f"{path}: cannot be read: {error}") from error
        if v2.functional.get_size(image) != size:
            raise ValueError(
                f"{path}: is not of {size[0]}x{size[1]} pixels, as the first training image is; "
                "data.name=imagenet takes images of all sizes"
            )
        images[row] = v2.functional.pil_to_tensor(image)
    return Split(images, torch.tensor(folder.targets))


@dataclass
class ImageNet:
    """ImageNet, or other photographs in folders, read and decoded while training.

    A training image is a random part of the photograph, scaled to a square and mirrored at random; a held-out
    one the square in its middle. What is drawn for an image follows from the seed, the epoch and the image: a
    resumed run sees the same, with any number of workers.

    Args:
        root: the folder that holds train/<class>/ and val/<class>/, or test/<class>/.
        batch_size: images per step over all ranks together, >= 1.
        evaluate_on: `test`, the held-out folder, or `validation`: a tenth of every class, held out of the
            training folder.
        crop: pixels on a side of what the model sees, >= 1.
        resize: pixels of the shorter side of a held-out photograph before it is cropped, >= `crop`.
        min_area: the least fraction of the photograph's area in a training image, in (0, 1].
        workers: processes on each rank that read images, >= 0; 0: the training process does.
    """

    root: str = "~/data/imagenet"
    batch_size: int = checked(256, at_least(1))
    evaluate_on: str = checked("test", one_of("test", "validation"))
    crop: int = checked(224, at_least(1))
    resize: int = checked(256, at_least(1))
    min_area: float = checked(0.08, fraction)
    workers: int = checked(8, at_least(0))

    def build(self, seed: int) -> tuple[DataLoader, Evaluator]:
        """Return a loader for training and the evaluator of the held-out split."""
        if self.resize < self.crop:
            raise ValueError(f"resize={self.resize} is smaller than crop={self.crop}")
        train, heldout = class_folders(self.root)
        stay: Any = range(len(train))
        if self.evaluate_on == "validation":
            stay, out = (part.tolist() for part in hold_out(torch.tensor(train.targets)))
            heldout = Subset(datasets.ImageFolder(train.root, self._middle()), out)
        else:
            heldout.transform = self._middle()
        drawn = _Drawn(Subset(train, stay), self._part(), seed)
        size = rank_share(self.batch_size, stay)
        settings: dict[str, Any] = {"num_workers": self.workers, "pin_memory": torch.cuda.is_available()}
        loader = train_loader(drawn, self.batch_size, seed, **settings)
        drawn.sampler = loader.sampler
        return loader, Evaluator(label=self.evaluate_on, dataloader=eval_loader(heldout, size, **settings))

    def _part(self) -> Callable[[Any], Tensor]:
        return v2.Compose(
            [
                v2.RandomResizedCrop(self.crop, scale=(self.min_area, 1.0), antialias=True),
                v2.RandomHorizontalFlip(),
                _ready(),
            ]
        )

    def _middle(self) -> Callable[[Any], Tensor]:
        return v2.Compose([v2.Resize(self.resize, antialias=True), v2.CenterCrop(self.crop), _ready()])


def _ready() -> Callable[[Any], Tensor]:
    return v2.Compose(
        [
            v2.ToImage(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(_IMAGENET_MEAN, _IMAGENET_STD),
            v2.ToPureTensor(),
        ]
    )


class _Drawn(Dataset):
    """Transforms each image with random numbers of its own, which follow from seed, epoch and its index.

    The workers get a copy of this data set, and of its sampler, at the start of every epoch.
    """

    def __init__(self, images: Dataset, transform: Callable[[Any], Tensor], seed: int) -> None:
        self.images = images
        self.transform = transform
        self.seed = seed
        self.sampler: Any = None

    def __len__(self) -> int:
        return len(self.images)  # type: ignore[arg-type]  # a Subset has a length

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image, label = self.images[index]
        with torch.random.fork_rng(devices=[]):
            key = (self.seed, self.sampler.epoch, index)
            torch.set_rng_state(generator(key, torch.device("cpu")).get_state())
            return self.transform(image), label
