"""How the commands are called. Nothing here imports torch, so that `--help` answers at once."""

from argparse import ArgumentParser, ArgumentTypeError
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from composer_sassha.recipes.errors import ConfigError
from composer_sassha.recipes.files import bundled_recipes

OPTIONAL = {"matplotlib", "scipy", "jinja2", "tabulate"}  # packages that comparisons need


class CommandParser(ArgumentParser):
    """An argument parser for which a mistake is a `ConfigError`: one line, like every other mistake."""

    def error(self, message: str) -> NoReturn:
        """Raise `message`, where argparse would print the usage and exit."""
        raise ConfigError(message)


def recipe_and_overrides(arguments: Sequence[str], default: str | None = None) -> tuple[str, list[str]]:
    """The recipe, which comes first if it is given at all, and the overrides.

    Args:
        arguments: those of the command that are not options.
        default: the recipe where none is given; None: one must be.

    Raises:
        ConfigError: no recipe is given, and there is no default.

    >>> recipe_and_overrides(["my.yaml", "seed=1"]), recipe_and_overrides(["seed=1"], default="digits")
    (('my.yaml', ['seed=1']), ('digits', ['seed=1']))
    """
    if arguments and ("=" not in arguments[0] or Path(arguments[0]).is_file()):
        return arguments[0], list(arguments[1:])
    if default is None:
        known = ", ".join(bundled_recipes())
        raise ConfigError(
            f"RECIPE: not given; name a YAML file or a bundled recipe first (there are: {known})"
        )
    return default, list(arguments)


def at_least_one(text: str) -> int:
    """An argument's type: a whole number from 1.

    >>> at_least_one("3")
    3
    """
    if not text.isdecimal() or int(text) < 1:
        raise ArgumentTypeError(f"{text!r}: must be a whole number from 1")
    return int(text)
