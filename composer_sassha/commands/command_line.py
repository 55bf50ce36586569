"""Parse the arguments of the commands. Nothing here imports torch, so that `--help` answers at once.

The functions that take `text` are argparse types: `parser.add_argument("--jobs", type=at_least_one)`.
"""

import math
import re
from argparse import ArgumentParser, ArgumentTypeError
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NoReturn

from composer_sassha.recipes.errors import ConfigError
from composer_sassha.recipes.files import bundled_recipes

OPTIONAL = {"matplotlib", "scipy", "jinja2", "tabulate"}  # packages that comparisons need

_SPEEDS = {
    f"{prefix}{unit}/s": scale * 1000**power
    for unit, scale in (("bit", 1 / 8), ("B", 1))
    for power, prefix in enumerate(["", "k", "M", "G", "T"])
}
_TIMES = {"s": 1.0, "ms": 1e-3, "us": 1e-6, "ns": 1e-9}


class CommandParser(ArgumentParser):
    """Parse arguments, and raise a `ConfigError` for a mistake: one line, like every other mistake."""

    def error(self, message: str) -> NoReturn:
        """Raise `message`, where argparse would print the usage and exit."""
        raise ConfigError(message.removeprefix("argument "))


def recipe_and_overrides(arguments: Sequence[str], default: str | None = None) -> tuple[str, list[str]]:
    """Split the arguments into the recipe, which comes first if it is given, and the overrides.

    Args:
        arguments: those of the command that are not options.
        default: the recipe if none is given; None: one must be given.

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
    """Parse a whole number from 1.

    >>> at_least_one("3")
    3
    """
    return _whole_number(text, least=1)


def at_least_two(text: str) -> int:
    """Parse a whole number from 2.

    >>> at_least_two("1")
    Traceback (most recent call last):
    argparse.ArgumentTypeError: '1' is not allowed; it must be a whole number from 2
    """
    return _whole_number(text, least=2)


def above_zero(text: str) -> float:
    """Parse a finite number above 0.

    >>> above_zero("0.05")
    0.05
    """
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise _refused(text, "a number above 0")
    return value


def names(text: str) -> list[str]:
    """Parse names with commas between them; a repeated one counts once.

    >>> names("sgd, sam,sgd")
    ['sgd', 'sam']
    """
    parts = [part.strip() for part in text.split(",")]
    if not all(parts):
        raise _refused(text, "names with commas between them, such as sgd,sam")
    return list(dict.fromkeys(parts))


def seeds(text: str) -> list[int]:
    """Parse seeds with commas between them; a repeated one counts once.

    >>> seeds("0,1,1")
    [0, 1]
    """
    parts = text.split(",")
    if not all(part.strip().isdecimal() and int(part) < 2**32 for part in parts):
        raise _refused(text, "whole numbers in [0, 2**32) with commas between them, such as 0,1,2")
    return list(dict.fromkeys(int(part) for part in parts))


def image_shape(text: str) -> tuple[int, int, int]:
    """Parse the channels, height and width of images.

    >>> image_shape("3x32x32")
    (3, 32, 32)
    """
    if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*){2}", text):
        raise _refused(text, "channels x height x width, such as 3x32x32")
    channels, height, width = map(int, text.split("x"))
    return channels, height, width


def bandwidth(text: str) -> float:
    """Parse the speed of a link, above 0, in bytes per second.

    >>> bandwidth("10Gbit/s")
    1250000000.0
    """
    value = _quantity(text, _SPEEDS)
    if value == 0:
        raise _refused(text, "above 0")
    return value


def duration(text: str) -> float:
    """Parse a time, at least 0, in seconds.

    >>> duration("0.5ms")
    0.0005
    """
    return _quantity(text, _TIMES)


def _whole_number(text: str, least: int) -> int:
    if not text.isdecimal() or int(text) < least:
        raise _refused(text, f"a whole number from {least}")
    return int(text)


def _quantity(text: str, units: Mapping[str, float]) -> float:
    found = re.fullmatch(r"(\d+\.?\d*|\.\d+)\s*(\D+)", text)
    if found is None or found[2] not in units:
        raise _refused(text, f"a number and a unit ({', '.join(units)})")
    return float(found[1]) * units[found[2]]


def _refused(text: str, allowed: str) -> ArgumentTypeError:
    return ArgumentTypeError(f"{text!r} is not allowed; it must be {allowed}")
