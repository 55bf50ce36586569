"""The splits of the digits, and the loaders."""

import pytest
import torch
from composer.utils import dist

from composer_sassha.recipes.data import Digits, _Shift


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
