"""Where recipes are found. Nothing here imports torch, so that `--help` answers at once."""

from pathlib import Path

from composer_sassha.recipes.errors import ConfigError, did_you_mean


def bundled_recipes() -> dict[str, Path]:
    """The recipes that come with the package, by name.

    >>> "digits" in bundled_recipes()
    True
    """
    package = Path(__file__).parents[1]
    # A wheel carries them inside the package; in a clone they lie beside it.
    folder = next(f for f in (package / "yamls", package.parent / "yamls") if f.is_dir())
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def find_recipe(recipe: str) -> Path:
    """The file that `recipe` means: a path, or a bundled one as `digits`, `digits.yaml`, `yamls/digits.yaml`.

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
    beside = [str(other) for pattern in ("*.yaml", "*.yml") for other in path.parent.glob(pattern)]
    near = did_you_mean(recipe, beside) or did_you_mean(path.stem, bundled)
    hint = near or f"; the bundled ones are: {', '.join(bundled)}"
    raise ConfigError(f"{recipe}: there is no such recipe{hint}")
