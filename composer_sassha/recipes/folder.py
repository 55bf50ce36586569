"""The run folder: what an earlier call left in it, whose it is now, and what goes if a run never begins."""

import json
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar
from zipfile import is_zipfile

import yaml
from composer.utils import dist
from filelock import FileLock, Timeout

from composer_sassha.recipes.config import Recipe, load_recipe
from composer_sassha.recipes.errors import ConfigError
from composer_sassha.recipes.run_log import write_atomically

LATEST = "latest-rank0.pt"  # Composer's link to the newest checkpoint
# These do not change what a run computes.
_NOT_COMPARED = {"baseline", "progress_bar", "save_folder", "tuning_runs", "callbacks"}
_ELSEWHERE = "choose another save_folder, such as save_folder=runs2"

T = TypeVar("T")


def on_rank_zero(action: Callable[[], T]) -> T:
    """Have rank 0 deal with the disk; all ranks get what it returns or raises, and so go the same way."""
    answer: list[Any] = [None]
    if dist.get_global_rank() == 0:
        try:
            answer = [action()]
        except Exception as error:
            answer = [error]
    dist.broadcast_object_list(answer)
    if isinstance(answer[0], Exception):
        raise answer[0]
    return answer[0]


def earlier_results(recipe: Recipe) -> dict[str, Any] | None:
    """The results in the run folder if it holds this run, finished; refuses a folder with anything else."""
    config, results = recipe.folder / "config.yaml", recipe.folder / "results.json"
    if not config.exists():
        if recipe.folder.exists() and _holds_something(recipe.folder):
            raise ConfigError(f"{recipe.folder}: exists and is not a run; {_ELSEWHERE}")
        return None
    now = recipe.flat_settings()
    try:
        earlier = load_recipe(config)
    except ConfigError as error:
        raise ConfigError(
            f"{recipe.folder}: holds a run that cannot be read ({error}); {_ELSEWHERE}"
        ) from error
    before = earlier.flat_settings()
    different = [
        f"{key} ({before.get(key)} there, {now.get(key)} here)"
        for key in sorted(before.keys() | now.keys())
        if key.split(".")[0] not in _NOT_COMPARED
        and (key in before, before.get(key)) != (key in now, now.get(key))
    ]
    # With other callbacks it is the same run. But those that are asked for now cannot measure any more what
    # has been trained, and it would be wrong to go on, or to be done, as if they had.
    unmeasured = bool(recipe.callbacks) and recipe.callbacks != earlier.callbacks
    if (different or unmeasured) and not results.exists() and not any(recipe.folder.glob("checkpoints/*")):
        return None  # it ended before it had anything to lose
    if different:
        raise ConfigError(f"{recipe.folder}: holds a run with another {', '.join(different)}; {_ELSEWHERE}")
    if unmeasured:
        raise ConfigError(
            f"{recipe.folder}: holds this run without the callbacks given here, which cannot measure what is "
            f"trained already; leave them out, or {_ELSEWHERE}"
        )
    if not results.exists():
        return None
    found = read_results(results)
    if found is None:
        raise ConfigError(
            f"{results}: is damaged; delete it, and the same command evaluates and writes it again"
        )
    return found


def _holds_something(path: Path) -> bool:
    """Whether there is a file here, or a folder with more than the lock of a run that never began."""
    return not path.is_dir() or any(entry.name != ".lock" for entry in path.iterdir())


def read_results(path: Path) -> dict[str, Any] | None:
    """What `_write_results` wrote, or None if it is not that any more."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return found if {"loss", "seconds_per_step", "world_size", "device"} <= found.keys() else None
    except (OSError, ValueError, AttributeError):
        return None


def lock_folder(recipe: Recipe, lock: FileLock) -> list[Path]:
    """Make the run folder this process's own. Return the folders that had to be made, the innermost first."""
    made = [path for path in (recipe.folder, *recipe.folder.parents) if not path.exists()]
    try:
        recipe.folder.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
    except Timeout as error:
        raise ConfigError(
            f"{recipe.folder}: another process trains this run; wait for it, or {_ELSEWHERE}"
        ) from error
    except OSError as error:
        raise ConfigError(f"save_folder={recipe.save_folder}: cannot be written to: {error}") from error
    return made


def prepare_folder(recipe: Recipe) -> str | None:
    """Write the settings into the folder. Return the checkpoint to continue from, if there is one."""
    config = yaml.safe_dump(recipe.settings(), sort_keys=False)
    latest = recipe.folder / "checkpoints" / LATEST
    try:
        write_atomically(recipe.folder / "config.yaml", config)
        # A kill may fall between the moments when Composer removes its link to the newest checkpoint and
        # makes it anew. One that it was still writing lacks the end, which makes a zip file of it.
        checkpoints = [path for path in latest.parent.glob("ep*-ba*-rank0.pt") if is_zipfile(path)]
        if checkpoints and not latest.exists():
            latest.unlink(missing_ok=True)
            latest.symlink_to(
                max(checkpoints, key=lambda path: int(re.findall(r"-ba(\d+)-", path.name)[0])).name
            )
    except OSError as error:
        raise ConfigError(f"save_folder={recipe.save_folder}: cannot be written to: {error}") from error
    return str(latest.resolve()) if latest.exists() else None


def check_seen(checkpoint: str | None) -> None:
    """Refuse a checkpoint on one node's own disk: every node loads it."""
    seen = dist.all_gather_object(checkpoint is None or Path(checkpoint).exists())
    if not all(seen):
        raise ConfigError(
            f"{checkpoint}: rank {seen.index(False)} does not see it; copy it there, or move the run to a "
            "disk that all nodes share"
        )


@contextmanager
def removed_on_failure(made: Sequence[Path]) -> Iterator[None]:
    """Leave none of the folders that were made for this run behind when the block fails."""
    try:
        yield
    except BaseException:
        if made and dist.get_global_rank() == 0:
            shutil.rmtree(made[0], ignore_errors=True)
            with suppress(OSError):  # not empty: somebody else uses it by now
                for path in made[1:]:
                    path.rmdir()
        raise
