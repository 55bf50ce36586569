"""Images in folders: how they are read, what is drawn for them, and what is refused."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import v2

from composer_sassha.recipes.data import (
    ImageFolder,
    ImageNet,
)


def rows(pixels: Tensor) -> set[bytes]:
    return {row.numpy().tobytes() for row in pixels}


def write_images(root: Path, sizes: dict[str, tuple[int, int]], classes: str = "ab", count: int = 10) -> Path:
    """`count` photographs of each class in each of the folders, every one of another colour."""
    for folder, size in sizes.items():
        for label, name in enumerate(classes):
            (root / folder / name).mkdir(parents=True)
            for k in range(count):
                colour = (20 * k, 100 * label, 40 if folder == "train" else 80)
                Image.new("RGB", size, colour).save(root / folder / name / f"{k}.png")
    return root


@pytest.mark.parametrize("heldout", ["test", "val"])
def test_a_folder_of_images_is_held_in_memory(heldout: str, tmp_path: Path) -> None:
    root = write_images(tmp_path, {"train": (12, 8), heldout: (12, 8)})
    train, test = ImageFolder(root=str(root)).read()
    assert train.images.shape == (20, 3, 8, 12) and train.images.dtype == torch.uint8
    assert train.labels.tolist() == [0] * 10 + [1] * 10
    assert train.images[13, :, 0, 0].tolist() == [60, 100, 40]
    assert test.images[0, :, 0, 0].tolist() == [0, 0, 80]


def test_what_is_wrong_with_a_folder_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(root: Path, said: str) -> None:
        with pytest.raises(ValueError, match=said):
            ImageFolder(root=str(root)).read()

    refused(Path("~nobody-here/images"), "root=~nobody-here/images: .*home")
    refused(tmp_path / "none", r"none: must hold train/<class>/ and test/<class>/ \(or val/<class>/\)")
    (tmp_path / "empty/train").mkdir(parents=True)
    refused(tmp_path / "empty", "must hold train")
    (tmp_path / "empty/test").mkdir()
    refused(tmp_path / "empty", "find any class folder")
    mixed = write_images(tmp_path / "mixed", {"train": (8, 8), "test": (8, 9)})
    refused(mixed, "0.png: is not of 8x8 pixels.*data.name=imagenet")
    classes = write_images(tmp_path / "classes", {"train": (8, 8), "test": (8, 8)})
    (classes / "test/b").rename(classes / "test/c")
    refused(classes, "train and test differ in the class b")
    with monkeypatch.context() as patched:  # as root reads everything, it is only said to be refused
        patched.setattr("os.scandir", lambda path: (_ for _ in ()).throw(PermissionError(13, "denied", path)))
        refused(classes, "classes: .*denied")
    damaged = write_images(tmp_path / "damaged", {"train": (8, 8), "test": (8, 8)})
    (damaged / "test/b/3.png").write_bytes(b"no image")
    refused(damaged, "b/3.png: cannot be read")
    monkeypatch.setattr("composer_sassha.recipes.data.folders._LIMIT", 100)
    refused(mixed, "20 images of 8x8 take 0 GiB; data.name=imagenet reads them as they are used")


def photographs(root: Path) -> Path:
    """As ImageNet has them: of several sizes, and not of one colour."""
    generator = np.random.default_rng(0)
    for folder in ("train", "val"):
        for name in "ab":
            (root / folder / name).mkdir(parents=True)
            for k in range(10):
                pixels = generator.integers(256, size=(30 + k, 40, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / folder / name / f"{k}.png")
    return root


def test_photographs_are_cropped(tmp_path: Path) -> None:
    data = ImageNet(root=str(photographs(tmp_path)), batch_size=4, crop=16, resize=20, workers=0)
    train, evaluator = data.build(seed=0)
    batches = list(train)
    assert [images.shape for images, _ in batches] == [(4, 3, 16, 16)] * 5
    assert sorted(torch.cat([labels for _, labels in batches]).tolist()) == [0] * 10 + [1] * 10
    heldout = torch.cat([images for images, _ in evaluator.dataloader.dataloader])
    image = Image.open(tmp_path / "val/a/0.png")
    middle = v2.functional.center_crop(v2.functional.resize(image, [20]), [16])
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    expected = (v2.functional.pil_to_tensor(middle) / 255 - mean[:, None, None]) / std[:, None, None]
    assert heldout.shape == (20, 3, 16, 16)
    torch.testing.assert_close(heldout[0], expected)


def test_what_is_drawn_for_a_photograph_follows_from_seed_epoch_and_image(tmp_path: Path) -> None:
    root = str(photographs(tmp_path))

    def drawn(seed: int = 0, epoch: int = 0, workers: int = 0, skip: int = 0) -> list[Tensor]:
        train, _ = ImageNet(root=root, batch_size=4, crop=16, resize=20, workers=workers).build(seed)
        train.sampler.set_epoch(epoch)
        torch.manual_seed(skip)  # what else was drawn in this process does not matter
        return [images for images, _ in train][skip:]

    first = drawn()
    for again in (drawn(skip=2), drawn(workers=2, skip=1)):
        assert all(map(torch.equal, first[-len(again) :], again))
    for other in (drawn(seed=1), drawn(epoch=1)):  # other crops, not only another order
        assert not rows(torch.cat(first)) & rows(torch.cat(other))


def test_the_validation_part_of_photographs_is_seen_whole(tmp_path: Path) -> None:
    settings = {"root": str(photographs(tmp_path)), "batch_size": 4, "crop": 16, "resize": 20, "workers": 0}
    train, evaluator = ImageNet(**settings, evaluate_on="validation").build(0)
    assert evaluator.label == "validation" and len(train.dataset) == 18
    (batch,) = evaluator.dataloader.dataloader
    (again,) = ImageNet(**settings, evaluate_on="validation").build(1)[1].dataloader.dataloader
    assert batch[1].tolist() == [0, 1] and torch.equal(batch[0], again[0])
    with pytest.raises(ValueError, match="resize=10 is smaller than crop=16"):
        ImageNet(**settings | {"resize": 10}).build(0)
    with pytest.raises(ValueError, match="batch_size=40 is larger"):
        ImageNet(**settings | {"batch_size": 40}).build(0)
