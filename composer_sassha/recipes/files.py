"""Find recipes and write files. Nothing here imports torch, so that `--help` answers at once."""

import os
from pathlib import Path

from composer_sassha.recipes.errors import ConfigError, did_you_mean


def bundled_recipes() -> dict[str, Path]:
    """Return the paths of the recipes that come with the package, by name.

    >>> "digits" in bundled_recipes()
    True
    """
    package = Path(__file__).parents[1]
    # A wheel carries them inside the package; in a clone they lie next to it.
    folder = next(f for f in (package / "yamls", package.parent / "yamls") if f.is_dir())
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def find_recipe(recipe: str) -> Path:
    """Return the file of a recipe.

    Args:
        recipe: a path, or a bundled recipe as `digits`, `digits.yaml` or `yamls/digits.yaml`.

    Raises:
        ConfigError: there is none; the message names the nearest recipe that exists.
    """
    path = Path(recipe)
    if path.is_file():
        return path
    bundled = bundled_recipes()
    if (
        path.name
        and path.with_suffix("") in (Path(path.stem), Path("yamls", path.stem))
        and path.stem in bundled
    ):
        return bundled[path.stem]
    if path.is_dir():
        raise ConfigError(
            f"{recipe or '(empty)'}: is no recipe file; the bundled ones are: {', '.join(bundled)}"
        )
    neighbours = [str(other) for pattern in ("*.yaml", "*.yml") for other in path.parent.glob(pattern)]
    near = did_you_mean(recipe, neighbours) or did_you_mean(path.stem, bundled)
    hint = near or f"; the bundled ones are: {', '.join(bundled)}"
    raise ConfigError(f"{recipe}: there is no such recipe{hint}")


def write_atomically(path: Path, text: str) -> None:
    """Write a file so that a reader, or a crash, finds the old content or the new, never a part."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)
