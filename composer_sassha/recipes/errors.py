"""The one exception for a mistake of the user's. Nothing here imports torch, so that it is told at once."""

from collections.abc import Iterable
from difflib import get_close_matches


class ConfigError(ValueError):
    """A mistake in what the user asked for; its message is one line that names the key and the value."""

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.split()))


def did_you_mean(word: object, known: Iterable[str], prefix: str = "") -> str:
    """The end of an error message: the nearest of the `known` words, or nothing when none is near.

    >>> did_you_mean("sasha", ["sgd", "sassha"])
    '; did you mean sassha?'
    """
    near = get_close_matches(str(word), known, n=1, cutoff=0.5)
    return f"; did you mean {prefix}{near[0]}?" if near else ""
