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

from composer_sassha.recipes.data import (
    CIFAR10,
    CIFAR100,
    MNIST,
    SVHN,
    Digits,
    FashionMNIST,
)
from composer_sassha.recipes.data.digits import _Shift


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
