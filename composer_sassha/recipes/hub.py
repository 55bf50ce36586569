"""Files of the Hugging Face hub: by name where there is a network, from a folder where there is none."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")


def fetched(load: Callable[[], T], what: str, remedy: str) -> T:
    """What `load` returns, which looks on the hub or in a folder.

    Args:
        load: without arguments.
        what: is loaded, as the recipe's setting.
        remedy: what to do where there is a network.

    Raises:
        ValueError: it cannot be loaded; the message, of one line, has the reason and the remedy.

    >>> fetched(lambda: 1 / 0, "root=x", "fetch it")
    Traceback (most recent call last):
    ValueError: root=x: cannot be loaded (division by zero); where there is a network, fetch it
    """
    hub = logging.getLogger("huggingface_hub")
    level = hub.level
    hub.setLevel(logging.ERROR)  # without a network it warns of each of six attempts, over many lines
    try:
        return load()
    except (
        Exception
    ) as error:  # of many kinds: no network, no such name, half a file, weights of another shape
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise ValueError(
            f"{what}: cannot be loaded ({reason}); where there is a network, {remedy}"
        ) from error
    finally:
        hub.setLevel(level)


def pretrained(from_pretrained: Callable[..., T], setting: str, name: str, **settings: Any) -> T:
    """What a class of transformers finds under a name or in a folder.

    Args:
        from_pretrained: of the class.
        setting: the recipe's key that holds the name, for messages.
        name: of a repository on the hub, or a folder.
        settings: more arguments of `from_pretrained`.

    Raises:
        ValueError: it cannot be loaded; the message says how to get it.
    """
    folder = Path(name).expanduser()
    return fetched(
        lambda: from_pretrained(str(folder) if folder.is_dir() else name, **settings),
        f"{setting}={name}",
        f"`huggingface-cli download {name} --local-dir FOLDER` fetches it for {setting}=FOLDER",
    )
