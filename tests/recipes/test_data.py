"""The data sets: their splits, what is drawn for an image and when it is drawn again, and what is refused."""

import gzip
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from composer.utils import dist
from filelock import FileLock
from PIL import Image
from torch import Tensor
from torchvision.transforms import v2

from composer_sassha.recipes.data import (
    CIFAR10,
    CIFAR100,
    MNIST,
    SVHN,
    Digits,
    FashionMNIST,
    ImageFolder,
    ImageNet,
)
from composer_sassha.recipes.data.digits import _Shift
from composer_sassha.recipes.data.images import (
    Augment,
    InMemoryImages,
    Split,
    channel_statistics,
    with_label_noise,
)
from composer_sassha.recipes.data.loading import hold_out, subset


def images(split: torch.utils.data.TensorDataset) -> torch.Tensor:
    return split.tensors[0].flatten(1)


def keys(pixels: torch.Tensor) -> set[bytes]:
    return {row.numpy().tobytes() for row in pixels.round().to(torch.int8)}


def raw(digits: Digits) -> tuple[torch.Tensor, torch.Tensor]:
    """The splits as grey levels, 0 to 16, whatever they were standardised with."""
    train, heldout = map(images, digits.splits())
    low, high = train.min(), train.max()
    return (train - low) / (high - low) * 16, (heldout - low) / (high - low) * 16


def test_splits_are_fixed_disjoint_and_stratified() -> None:
    train, test = Digits().splits()
    assert (len(train), len(test)) == (1437, 360)
    again, _ = Digits().splits()
    assert torch.equal(images(train), images(again))
    for split in (train, test):
        share = torch.bincount(split.tensors[1], minlength=10) / len(split)
        assert torch.allclose(share, torch.full((10,), 0.1), atol=0.005)
    train_pixels, test_pixels = raw(Digits())
    assert not keys(train_pixels) & keys(test_pixels)
    assert len(keys(train_pixels) | keys(test_pixels)) == 1797  # every image is different, so none is lost


def test_the_validation_part_comes_from_the_training_split() -> None:
    train, test = map(keys, raw(Digits()))
    rest, validation = map(keys, raw(Digits(evaluate_on="validation")))
    assert (len(rest), len(validation)) == (1149, 288)
    assert rest | validation == train and not rest & validation
    assert not (rest | validation) & test


def test_images_are_standardised_by_the_training_part() -> None:
    for digits in (Digits(), Digits(evaluate_on="validation")):
        train, _ = digits.splits()
        pixels = train.tensors[0]
        assert pixels.shape[1:] == (1, 8, 8) and pixels.dtype == torch.float32
        assert abs(float(pixels.mean())) < 1e-5 and abs(float(pixels.std()) - 1) < 1e-5


def test_the_batch_is_divided_among_the_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dist, "get_world_size", lambda: 4)
    train, test = Digits(batch_size=128).build(seed=0)
    images, labels = next(iter(train))
    assert images.shape == (32, 1, 8, 8) and labels.shape == (32,)
    assert len(train) == 11 and test.label == "test"
    with pytest.raises(ValueError, match="batch_size=130 cannot be divided by 4 ranks"):
        Digits(batch_size=130).build(seed=0)


def test_the_order_depends_on_the_seed_only() -> None:
    first, again, other = (next(iter(Digits().build(seed)[0]))[0] for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_shift_moves_by_at_most_its_pixels_and_pads_with_background() -> None:
    image = torch.arange(1.0, 65.0).reshape(1, 8, 8)
    shifted, labels = _Shift(1, background=-7.0)([(image, torch.tensor(k)) for k in range(200)])
    assert labels.tolist() == list(range(200))
    padded = torch.nn.functional.pad(image, [1] * 4, value=-7.0)
    allowed = {tuple(padded[0, i : i + 8, j : j + 8].flatten().tolist()) for i in range(3) for j in range(3)}
    assert {tuple(x.flatten().tolist()) for x in shifted} == allowed  # all nine turn up in 200 draws


# Images in memory


class Drawn(InMemoryImages):
    """200 images for training and 40 to test, of 3x8x8 pixels in 4 classes."""

    def read(self) -> tuple[Split, Split]:
        generator = torch.Generator().manual_seed(3)
        pixels = torch.randint(256, (240, 3, 8, 8), generator=generator, dtype=torch.uint8)
        labels = torch.arange(240) % 4
        return Split(pixels[:200], labels[:200]), Split(pixels[200:], labels[200:])


def levels(count: int, side: int = 6) -> Tensor:
    """Images whose pixels all differ, and differ from black."""
    return torch.arange(1, count * side * side + 1).remainder(255).add(1).byte().view(count, 1, side, side)


def augmented(pixels: Tensor, **settings: Any) -> Tensor:
    """The bytes that come out: the mean and deviation are chosen so that standardising does nothing."""
    augment = Augment(torch.zeros(1), torch.ones(1), **settings)
    images, _ = augment((pixels, torch.zeros(len(pixels))))
    return (images * 255).round().to(torch.uint8)


def rows(pixels: Tensor) -> set[bytes]:
    return {row.numpy().tobytes() for row in pixels}


def test_a_crop_is_the_image_moved_over_black_by_at_most_the_padding() -> None:
    image = levels(1)
    padded = torch.nn.functional.pad(image[0], [2] * 4)
    allowed = torch.stack([padded[:, i : i + 6, j : j + 6] for i in range(5) for j in range(5)])
    assert rows(augmented(image.repeat(800, 1, 1, 1), padding=2)) == rows(allowed)  # all 25, and no other


def test_about_half_of_the_images_are_mirrored() -> None:
    image = levels(1)
    out = augmented(image.repeat(400, 1, 1, 1), flip=True)
    mirrored = (out == image.flip(3)).flatten(1).all(1)
    assert (mirrored | (out == image).flatten(1).all(1)).all()
    assert 150 < int(mirrored.sum()) < 250


@pytest.mark.parametrize(("side", "share"), [(2, 1.0), (3, 1.0), (2, 0.25)])
def test_cutout_puts_the_mean_into_a_square(side: int, share: float) -> None:
    out = Augment(torch.zeros(1), torch.ones(1), cutout=side, cutout_share=share)(
        (levels(400), torch.zeros(400))
    )[0]
    cut = out[:, 0] == 0
    assert not cut.all(2).any() and not cut.all(1).any()
    assert torch.equal(cut, cut.any(2)[:, :, None] & cut.any(1)[:, None, :])  # a rectangle
    widths = cut.any(1).sum(1)
    assert set(widths.tolist()) <= {0, *range((side + 1) // 2, side + 1)} and int(widths.max()) == side
    assert cut.any(0).all()  # everywhere
    assert float((widths > 0).float().mean()) == pytest.approx(share, abs=0.1)


def test_the_policy_sees_bytes_and_changes_images() -> None:
    seen = []

    def policy(image: Tensor) -> Tensor:
        seen.append(image)
        return 255 - image

    pixels = levels(5)
    assert torch.equal(augmented(pixels, policy=policy), 255 - pixels)
    assert len(seen) == 5 and all(image.dtype == torch.uint8 and image.shape == (1, 6, 6) for image in seen)


@pytest.mark.parametrize("name", ["cifar10", "svhn", "imagenet"])
def test_every_policy_of_autoaugment_runs(name: str) -> None:
    batch = next(iter(Drawn(batch_size=50, auto_augment=name).build(0)[0]))[0]
    plain = next(iter(Drawn(batch_size=50, padding=0, flip=False).build(0)[0]))[0]
    assert batch.shape == plain.shape and batch.isfinite().all()
    assert not torch.equal(batch, plain)


def test_augmentations_are_drawn_from_the_global_generator_alone() -> None:
    settings = {"padding": 2, "flip": True, "cutout": 2, "policy": v2.AutoAugment()}
    augment = Augment(torch.zeros(3), torch.ones(3), **settings)
    batch = (torch.randint(256, (30, 3, 8, 8), dtype=torch.uint8), torch.zeros(30))
    state = torch.get_rng_state()
    first, other = augment(batch)[0], augment(batch)[0]
    torch.set_rng_state(state)
    assert torch.equal(augment(batch)[0], first) and not torch.equal(first, other)


def test_channels_are_standardised_by_the_training_part() -> None:
    for data in (Drawn(batch_size=180), Drawn(batch_size=180, evaluate_on="validation")):
        train, heldout = data.splits()
        mean, std = channel_statistics(train.images)
        pixels = train.images.double() / 255
        torch.testing.assert_close(mean.double(), pixels.mean((0, 2, 3)), rtol=1e-6, atol=0)
        torch.testing.assert_close(std.double(), pixels.std((0, 2, 3), correction=0), rtol=1e-6, atol=0)
        _, evaluator = data.build(0)
        batches = [batch for batch, _ in evaluator.dataloader.dataloader]
        expected = (heldout.images / 255 - mean[:, None, None]) / std[:, None, None]
        torch.testing.assert_close(torch.cat(batches), expected)


def test_a_constant_channel_does_not_become_nan() -> None:
    mean, std = channel_statistics(torch.full((4, 1, 2, 2), 7, dtype=torch.uint8))
    out, _ = Augment(mean, std)((torch.full((4, 1, 2, 2), 7, dtype=torch.uint8), torch.zeros(4)))
    assert torch.allclose(out, torch.zeros(4, 1, 2, 2), atol=1e-6)


def test_the_validation_part_is_a_tenth_of_every_class_and_does_not_move() -> None:
    train, test = Drawn().splits()
    rest, validation = Drawn(evaluate_on="validation").splits()
    assert validation.labels.bincount().tolist() == [5] * 4 and rest.labels.bincount().tolist() == [45] * 4
    assert rows(rest.images) | rows(validation.images) == rows(train.images)
    assert not rows(rest.images) & rows(validation.images) and not rows(train.images) & rows(test.images)
    assert torch.equal(validation.images, Drawn(evaluate_on="validation").splits()[1].images)
    assert Drawn(batch_size=8, evaluate_on="validation").build(0)[1].label == "validation"


def test_every_class_keeps_its_share_of_what_is_held_out() -> None:
    labels = torch.tensor([0] * 50 + [1] * 20 + [2] * 4)
    stay, out = hold_out(labels)
    assert labels[out].bincount(minlength=3).tolist() == [5, 2, 0]
    assert torch.equal(torch.cat([stay, out]).sort()[0], torch.arange(74))


def test_label_noise_draws_a_share_of_the_labels_from_all_classes() -> None:
    labels = torch.arange(10).repeat(2000)
    noisy = with_label_noise(labels, classes=10, rate=0.4, seed=0)
    changed = noisy != labels
    assert float(changed.float().mean()) == pytest.approx(0.4 * 0.9, abs=0.01)  # a tenth is drawn as it was
    for label in range(10):  # from every class into all others alike
        became = noisy[(labels == label) & changed].bincount(minlength=10).float()
        assert became[label] == 0
        others = became[torch.arange(10) != label]
        assert float(others.min()) > 0.6 * float(others.mean())
    assert torch.equal(labels, torch.arange(10).repeat(2000))  # the given ones are as they were


def test_label_noise_has_a_seed_of_its_own_and_spares_what_is_held_out() -> None:
    clean, test = Drawn().splits()
    noisy, noisy_test = Drawn(label_noise=0.5).splits()
    assert torch.equal(clean.images, noisy.images) and not torch.equal(clean.labels, noisy.labels)
    assert torch.equal(test.labels, noisy_test.labels)
    assert torch.equal(noisy.labels, Drawn(label_noise=0.5).splits()[0].labels)
    assert not torch.equal(noisy.labels, Drawn(label_noise=0.5, noise_seed=1).splits()[0].labels)
    _, validation = Drawn(label_noise=0.5, evaluate_on="validation").splits()
    assert torch.equal(validation.labels, Drawn(evaluate_on="validation").splits()[1].labels)
    for seed in (0, 1):  # of the run: the same noise on the same images
        loader, _ = Drawn(batch_size=200, padding=0, flip=False, label_noise=0.5).build(seed)
        images, labels = next(iter(loader))
        mean, std = channel_statistics(noisy.images)
        pixels = ((images * std[:, None, None] + mean[:, None, None]) * 255).round().to(torch.uint8)
        label_of = {row.numpy().tobytes(): int(y) for row, y in zip(noisy.images, noisy.labels, strict=True)}
        assert [label_of[row.numpy().tobytes()] for row in pixels] == labels.tolist()


def test_the_digits_have_the_same_noise_and_spare_what_is_held_out() -> None:
    for part in ("test", "validation"):
        clean, heldout = Digits(evaluate_on=part).splits()
        noisy, spared = Digits(evaluate_on=part, label_noise=0.4, noise_seed=3).splits()
        assert torch.equal(clean.tensors[0], noisy.tensors[0])
        assert torch.equal(noisy.tensors[1], with_label_noise(clean.tensors[1], 10, 0.4, seed=3))
        assert not torch.equal(noisy.tensors[1], clean.tensors[1])
        assert torch.equal(heldout.tensors[1], spared.tensors[1])


@pytest.mark.parametrize("part", ["test", "validation"])
def test_a_part_of_the_training_split_is_always_the_same(part: str) -> None:
    whole, heldout = Drawn(evaluate_on=part).splits()
    some, again = (Drawn(evaluate_on=part, train_size=60, noise_seed=seed).splits() for seed in (0, 1))
    assert torch.equal(some[0].images, again[0].images) and torch.equal(some[0].labels, again[0].labels)
    assert torch.equal(some[1].images, heldout.images) and torch.equal(some[1].labels, heldout.labels)
    label_of = {row.numpy().tobytes(): int(y) for row, y in zip(whole.images, whole.labels, strict=True)}
    assert len(some[0].labels) == 60 and len(rows(some[0].images)) == 60
    assert [label_of[row.numpy().tobytes()] for row in some[0].images] == some[0].labels.tolist()
    fewer, _ = Drawn(evaluate_on=part, train_size=20).splits()
    assert rows(fewer.images) < rows(some[0].images)  # a larger part holds a smaller one
    every, _ = Drawn(evaluate_on=part, train_size=len(whole.labels)).splits()
    assert torch.equal(every.images, whole.images)


def test_a_part_is_what_is_standardised_made_noisy_and_divided(monkeypatch: pytest.MonkeyPatch) -> None:
    data = Drawn(train_size=60, batch_size=20, label_noise=0.5, padding=0, flip=False)
    clean = Drawn(train_size=60).splits()[0]
    assert torch.equal(data.splits()[0].labels, with_label_noise(clean.labels, 4, 0.5, seed=0))
    mean, std = channel_statistics(clean.images)
    train, _ = data.build(seed=0)
    pixels = torch.cat([images for images, _ in train]) * std[:, None, None] + mean[:, None, None]
    assert rows((pixels * 255).round().to(torch.uint8)) == rows(clean.images)
    with pytest.raises(ValueError, match=r"batch_size=64 is larger than the training split \(60\)"):
        Drawn(train_size=60, batch_size=64).build(seed=0)


def test_a_part_that_is_larger_than_the_split_is_refused() -> None:
    for data, size in ((Drawn(train_size=201), 200), (Drawn(train_size=181, evaluate_on="validation"), 180)):
        with pytest.raises(ValueError, match=rf"train_size={data.train_size} is larger .*\({size}\)"):
            data.build(seed=0)


def test_images_are_scaled_when_they_are_read() -> None:
    """To half the size: close to the mean of each four pixels; an antialiased resize weighs more of them."""
    whole, halved = (Drawn(train_size=60, label_noise=0.5, image_size=size).splits() for size in (None, 4))
    flat = torch.full((1, 3, 8, 8), 77, dtype=torch.uint8)
    for before, after in zip(whole, halved, strict=True):
        assert after.images.dtype == torch.uint8 and after.images.shape == (len(before.labels), 3, 4, 4)
        assert torch.equal(after.labels, before.labels)
        means = before.images.float().unfold(2, 2, 2).unfold(3, 2, 2).mean((4, 5))
        assert torch.corrcoef(torch.stack([means.flatten(), after.images.float().flatten()]))[0, 1] > 0.9
    assert (Drawn(image_size=4)._scaled(Split(flat, torch.zeros(1))).images == 77).all()
    train, heldout = Drawn(image_size=4, batch_size=20, padding=1).build(seed=0)
    for loader in (train, heldout.dataloader.dataloader):
        assert next(iter(loader))[0].shape[1:] == (3, 4, 4)


def test_every_sample_is_as_likely_to_be_in_a_part() -> None:
    """Its order is not that of the data set, which is often sorted by class."""
    chosen = subset(1000, 500)
    assert chosen.tolist() == sorted({*chosen.tolist()})
    assert 200 < int((chosen < 500).sum()) < 300  # 250 and 8 in deviation, if each is drawn alike


def test_a_batch_in_memory_is_divided_among_the_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dist, "get_world_size", lambda: 4)
    train, test = Drawn(batch_size=64).build(seed=0)
    assert [batch[0].shape for batch in train] == [(16, 3, 8, 8)] * 3
    assert sum(len(labels) for _, labels in test.dataloader.dataloader) == 10
    with pytest.raises(ValueError, match="batch_size=66 cannot be divided by 4 ranks"):
        Drawn(batch_size=66).build(seed=0)
    with pytest.raises(ValueError, match=r"batch_size=400 is larger than the training split \(200\)"):
        Drawn(batch_size=400).build(seed=0)


# Data sets of torchvision, from files of their formats


def pickled(path: Path, content: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(pickle.dumps(content))


def write_cifar10(root: Path) -> None:
    folder, pixels = root / "cifar-10-batches-py", np.arange(3072, dtype=np.uint8)
    for name in [*(f"data_batch_{k}" for k in range(1, 6)), "test_batch"]:
        pickled(folder / name, {"data": np.stack([pixels, 255 - pixels]), "labels": [3, 9]})
    pickled(folder / "batches.meta", {"label_names": list("abcdefghij")})


def write_cifar100(root: Path) -> None:
    folder, pixels = root / "cifar-100-python", np.arange(3072, dtype=np.uint8)
    for name in ("train", "test"):
        pickled(folder / name, {"data": np.stack([pixels, 255 - pixels]), "fine_labels": [3, 99]})
    pickled(folder / "meta", {"fine_label_names": [str(k) for k in range(100)]})


def write_mnist(root: Path, name: str) -> None:
    folder = root / name / "raw"
    folder.mkdir(parents=True)
    pixels = np.arange(2 * 784, dtype=np.uint8)
    for part in ("train", "t10k"):
        for kind, dims, content in (
            ("images-idx3", (2, 28, 28), pixels),
            ("labels-idx1", (2,), np.array([3, 9], dtype=np.uint8)),
        ):
            header = bytes([0, 0, 8, len(dims)]) + b"".join(d.to_bytes(4, "big") for d in dims)
            (folder / f"{part}-{kind}-ubyte").write_bytes(header + content.tobytes())
            with gzip.open(folder / f"{part}-{kind}-ubyte.gz", "wb") as file:
                file.write(header + content.tobytes())


def write_svhn(root: Path) -> None:
    savemat = pytest.importorskip("scipy.io").savemat
    pixels = np.arange(3072, dtype=np.uint8).reshape(3, 32, 32).transpose(1, 2, 0)
    for name in ("train", "test"):
        content = {"X": np.stack([pixels, 255 - pixels], axis=3), "y": np.array([[3], [10]], dtype=np.uint8)}
        savemat(root / f"{name}_32x32.mat", content)


@pytest.mark.parametrize(
    ("schema", "write", "shape", "labels"),
    [
        (CIFAR10, write_cifar10, (10, 3, 32, 32), [3, 9]),
        (CIFAR100, write_cifar100, (2, 3, 32, 32), [3, 99]),
        (MNIST, lambda root: write_mnist(root, "MNIST"), (2, 1, 28, 28), [3, 9]),
        (FashionMNIST, lambda root: write_mnist(root, "FashionMNIST"), (2, 1, 28, 28), [3, 9]),
        (SVHN, write_svhn, (2, 3, 32, 32), [3, 0]),  # the file says 10 for a zero
    ],
)
def test_a_data_set_of_torchvision_is_read_as_bytes(
    schema: type,
    write: Callable[[Path], None],
    shape: tuple[int, ...],
    labels: list[int],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *_: True)
    monkeypatch.setattr("torchvision.datasets.svhn.check_integrity", lambda *_: True)
    write(tmp_path)
    train, test = schema(root=str(tmp_path)).read()
    assert train.images.shape == shape and train.images.dtype == torch.uint8
    assert train.labels[:2].tolist() == labels and train.labels.dtype == torch.int64
    first = torch.arange(shape[1] * shape[2] * shape[3]).byte().view(shape[1:])
    assert torch.equal(train.images[0], first) and torch.equal(test.images[0], first)
    assert test.images.shape == (2, *shape[1:])


@pytest.mark.parametrize("schema", [CIFAR10, CIFAR100, MNIST, FashionMNIST, SVHN])
def test_a_missing_data_set_says_how_to_get_it(schema: type, tmp_path: Path) -> None:
    if schema is SVHN:
        pytest.importorskip("scipy")
    with pytest.raises(ValueError, match=rf"{schema.__name__} is not there.*add data.download=true"):
        schema(root=str(tmp_path)).build(0)
    assert list(tmp_path.iterdir()) == []


def test_a_download_that_fails_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*_: Any, **__: Any) -> None:
        raise OSError("no route to host")

    monkeypatch.setattr("torchvision.datasets.cifar.download_and_extract_archive", offline)
    with pytest.raises(ValueError, match="CIFAR10 cannot be had: no route to host"):
        CIFAR10(root=str(tmp_path), download=True).build(0)


@pytest.mark.parametrize("download", [False, True])
def test_a_root_that_cannot_be_used_is_one_line(
    download: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unasked(*_: Any, **__: Any) -> None:
        raise AssertionError("downloads")

    monkeypatch.setattr("torchvision.datasets.cifar.download_and_extract_archive", unasked)
    (tmp_path / "file").touch()
    (tmp_path / "locked/.download.lock").mkdir(parents=True)
    roots = {"~nobody-here/data": "home"}
    if download:  # without, nothing is written, and the data set is just not there
        # /proc is there and takes no file: a lock in it would be waited for in vain.
        roots |= {"/proc": "/proc", str(tmp_path / "file"): "exists", str(tmp_path / "locked"): "directory"}
    for root, said in roots.items():
        with pytest.raises(ValueError, match=f"root={root}: .*{said}") as refused:
            CIFAR10(root=root, download=download).build(0)
        assert "\n" not in str(refused.value)


def test_another_process_that_does_not_come_to_an_end_is_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("composer_sassha.recipes.data.torchvision_sets._PATIENCE", 0.2)
    with (
        FileLock(tmp_path / ".download.lock"),
        pytest.raises(
            ValueError, match=r"another process has held .*\.download\.lock for .* delete that file"
        ),
    ):
        CIFAR10(root=str(tmp_path), download=True).build(0)


# Folders


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
    refused(tmp_path / "none", r"none: has to hold train/<class>/ and test/<class>/ \(or val/<class>/\)")
    (tmp_path / "empty/train").mkdir(parents=True)
    refused(tmp_path / "empty", "has to hold train")
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
