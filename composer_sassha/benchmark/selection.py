"""Select the methods that are measured, each with its overrides, on a recipe's data or on random images."""

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from composer import Evaluator
from torch.utils.data import DataLoader, TensorDataset

from composer_sassha.recipes.config import Recipe, load_recipe, read_recipe
from composer_sassha.recipes.errors import ConfigError, did_you_mean


@dataclass
class RandomImages:
    """One batch of noise with random labels, which the time of a step does not depend on.

    Args:
        batch_size: samples over all ranks.
        shape: of an image: channels, height, width.
        classes: number of labels.
    """

    batch_size: int
    shape: tuple[int, int, int]
    classes: int

    def build(self, seed: int) -> tuple[DataLoader, Evaluator]:
        """Return a loader of this batch, and an evaluator on it.

        Args:
            seed: of the noise.
        """
        draw = torch.Generator().manual_seed(seed)
        images = torch.randn(self.batch_size, *self.shape, generator=draw)
        labels = torch.randint(self.classes, (self.batch_size,), generator=draw)
        loader = DataLoader(TensorDataset(images, labels), self.batch_size)
        return loader, Evaluator(label="random", dataloader=loader)


def chosen_recipes(
    recipe: str,
    overrides: Sequence[str] = (),
    methods: Sequence[str] = (),
    images: tuple[int, int, int] | None = None,
) -> dict[str, Recipe]:
    """Return the recipe of every chosen method and of the baseline.

    Args:
        recipe: a path, or the name of a bundled recipe.
        overrides: `key=value` for every method, `METHOD:key=value` for one.
        methods: names of methods; without any, all.
        images: shape of random images in place of the recipe's data.

    Raises:
        ConfigError: one of these has a mistake.

    >>> [*chosen_recipes("digits", ["sam:algorithms.sam.rho=0.5"], ["sam"])]
    ['sgd', 'sam']
    """
    given, known = read_recipe(recipe)
    if not known:
        raise ConfigError(f"{recipe}: its methods are empty; add at least one")
    for method in methods:
        _look_up(method, known, f"--methods: {method!r}")
    shared, own = _divided(overrides, known)
    chosen = [m for m in known if not methods or m in (*methods, given.get("baseline"))]
    found = {m: load_recipe(recipe, [*shared, *own.get(m, []), f"method={m}"]) for m in chosen}
    return found if images is None else {m: _with_images(r, images) for m, r in found.items()}


def _divided(overrides: Sequence[str], known: Collection[str]) -> tuple[list[str], dict[str, list[str]]]:
    """Divide the overrides into those for all methods and those for one."""
    shared: list[str] = []
    own: dict[str, list[str]] = {}
    for override in overrides:
        if override.startswith("method="):
            raise ConfigError(f"{override}: leave it out; --methods selects methods")
        method, colon, setting = override.partition(":")
        if not colon or "=" in method:
            shared.append(override)
            continue
        _look_up(method, known, f"{override}: {method!r}")
        own.setdefault(method, []).append(setting)
    return shared, own


def _look_up(method: str, known: Collection[str], where: str) -> None:
    if method not in known:
        near = did_you_mean(method, known)
        raise ConfigError(f"{where} is unknown{near} (there are: {', '.join(known)})")


def _with_images(recipe: Recipe, shape: tuple[int, int, int]) -> Recipe:
    return replace(recipe, data=RandomImages(batch_size(recipe), shape, recipe.model.num_classes))


def batch_size(recipe: Recipe) -> int:
    """Return the samples of a batch over all ranks.

    Raises:
        ConfigError: the recipe's data has no such setting.
    """
    size = getattr(recipe.data, "batch_size", None)
    if size is None:
        raise ConfigError(f"data: {type(recipe.data).__name__} has no batch_size, which bench needs")
    return size


def with_batch_size(recipe: Recipe, size: int) -> Recipe:
    """Return the recipe with another batch size."""
    return replace(recipe, data=replace(recipe.data, batch_size=size))


@contextmanager
def naming(method: str) -> Iterator[None]:
    """Re-raise what a constructor or the Trainer's start refuses as a ConfigError of this method."""
    try:
        yield
    except ValueError as error:  # a ConfigError too
        raise ConfigError(f"method {method}: {error}") from error
