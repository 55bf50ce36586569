"""Files of the Hugging Face hub: by name where there is a network, from a folder where there is none."""

import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")


def fetched(load: Callable[[], T], what: str, remedy: str) -> T:
    """Return the result of `load`, which looks on the hub or in a folder.

    Args:
        load: a function without arguments.
        what: the recipe's setting for what is loaded.
        remedy: what the user can do.

    Raises:
        ValueError: it cannot be loaded; the message, of one line, has the reason and the remedy.

    >>> fetched(lambda: 1 / 0, "root=x", "fetch it")
    Traceback (most recent call last):
    ValueError: root=x: cannot be loaded (division by zero); fetch it
    """
    hub = logging.getLogger("huggingface_hub")
    level = hub.level
    hub.setLevel(logging.ERROR)  # without a network it warns of each of six attempts, over many lines
    try:
        return load()
    except (
        Exception
    ) as error:  # of many kinds: no network, no such name, half a file, weights of another shape
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"{what}: cannot be loaded ({reason}); {remedy}") from error
    finally:
        hub.setLevel(level)


def pretrained(from_pretrained: Callable[..., T], setting: str, name: str, **settings: Any) -> T:
    """Load something of transformers by name or from a folder.

    Args:
        from_pretrained: the method of the class.
        setting: the recipe's key that holds the name, for messages.
        name: a repository on the hub, or a folder.
        settings: more arguments of `from_pretrained`.

    Raises:
        ValueError: it cannot be loaded; the message has how to get it.
    """
    folder = Path(os.path.expanduser(name))  # leaves an unknown user's home as it is
    if folder.is_dir():
        remedy = "the folder must hold what save_pretrained writes, of a model like the recipe's"
        return fetched(lambda: from_pretrained(str(folder), **settings), f"{setting}={name}", remedy)
    download = f"`huggingface-cli download {name} --local-dir FOLDER` fetches it for {setting}=FOLDER"
    return fetched(
        lambda: from_pretrained(name, **settings),
        f"{setting}={name}",
        f"where there is a network, {download}",
    )
