"""Images in memory: their parts, what is drawn for an image, and their noise."""

from typing import Any

import pytest
import torch
from composer.utils import dist
from torch import Tensor
from torchvision.transforms import v2

from composer_sassha.recipes.data import (
    Digits,
)
from composer_sassha.recipes.data.images import (
    Augment,
    InMemoryImages,
    Split,
    channel_statistics,
    with_label_noise,
)
from composer_sassha.recipes.data.loading import hold_out, subset


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
