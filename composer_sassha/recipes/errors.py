"""The exception for a mistake of the user's. Nothing here imports torch, so that a mistake shows at once."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from difflib import get_close_matches

# The extra of this package that brings each optional package.
_EXTRAS = {"sklearn": "demo", "matplotlib": "demo", "scipy": "demo", "transformers": "nlp", "datasets": "nlp"}


class ConfigError(ValueError):
    """A mistake in what the user asked for; its message is one line that names the key and the value."""

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.split()))


@contextmanager
def config_errors(where: str) -> Iterator[None]:
    """Re-raise ValueError and missing optional packages as ConfigError, prefixed with `where`.

    >>> with config_errors("optimizer"):
    ...     raise ValueError("lr=-1 is not allowed; it must be >= 0")
    Traceback (most recent call last):
    composer_sassha.recipes.errors.ConfigError: optimizer: lr=-1 is not allowed; it must be >= 0
    """
    try:
        yield
    except ModuleNotFoundError as error:
        if (package := (error.name or "").split(".")[0]) not in _EXTRAS:
            raise
        raise ConfigError(
            f"{where}: needs {package}; pip install 'composer_sassha[{_EXTRAS[package]}]'"
        ) from error
    except ValueError as error:
        raise ConfigError(f"{where}: {error}") from error


def did_you_mean(word: object, known: Iterable[str], prefix: str = "") -> str:
    """Return the end of an error message: the nearest of the `known` words, or nothing if none is near.

    >>> did_you_mean("sasha", ["sgd", "sassha"])
    '; did you mean sassha?'
    """
    near = get_close_matches(str(word), known, n=1, cutoff=0.5)
    return f"; did you mean {prefix}{near[0]}?" if near else ""
