"""The folder of a run: its settings, lock, checkpoints and results."""

import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from zipfile import is_zipfile

import yaml
from composer import State
from composer.utils import dist
from filelock import FileLock, Timeout

from composer_sassha.recipes.config import Recipe, load_recipe
from composer_sassha.recipes.errors import ConfigError
from composer_sassha.recipes.files import write_atomically
from composer_sassha.recipes.rank_zero import on_rank_zero
from composer_sassha.recipes.results import read_results, write_results
from composer_sassha.recipes.run_curves import draw_curves
from composer_sassha.recipes.run_log import RunLog

LATEST = "latest-rank0.pt"  # Composer's link to the newest checkpoint
_CHECKPOINTS = "ep*-ba*-rank0.pt"
# These do not change what a run computes.
_NOT_COMPARED = {"baseline", "progress_bar", "save_folder", "tuning_runs", "callbacks"}
_ELSEWHERE = "choose another save_folder, such as save_folder=runs2"


class RunFolder:
    """Read and write the folder of a run.

    Rank 0 does the work of every method; all ranks get its result or its exception. So every rank must call
    the same methods in the same order.

    Args:
        recipe: the run.
    """

    def __init__(self, recipe: Recipe) -> None:
        self.path = recipe.folder
        self.checkpoints = self.path / "checkpoints"
        self._recipe = recipe
        self._lock = FileLock(self.path / ".lock")
        self._made: list[Path] = []  # folders that this run had to make, the innermost first

    @on_rank_zero
    def earlier_results(self) -> dict[str, Any] | None:
        """Return the results if the folder holds this run, finished; None if there is something to train.

        Raises:
            ConfigError: the folder holds something else, such as a run with other settings.
        """
        config, results = self.path / "config.yaml", self.path / "results.json"
        if not config.exists():
            if self.path.exists() and _holds_something(self.path):
                raise ConfigError(f"{self.path}: exists and is not a run; {_ELSEWHERE}")
            return None
        try:
            earlier = load_recipe(config)
        except ConfigError as error:
            raise ConfigError(
                f"{self.path}: holds a run that cannot be read ({error}); {_ELSEWHERE}"
            ) from error
        different = _differences(earlier, self._recipe)
        # With other callbacks it is the same run. But new ones cannot measure what is trained already: going
        # on would leave gaps in their measurements.
        unmeasured = bool(self._recipe.callbacks) and self._recipe.callbacks != earlier.callbacks
        if (different or unmeasured) and not results.exists() and not any(self.checkpoints.glob("*")):
            return None  # it ended before it had anything to lose
        if different:
            raise ConfigError(f"{self.path}: holds a run with another {', '.join(different)}; {_ELSEWHERE}")
        if unmeasured:
            raise ConfigError(
                f"{self.path}: holds this run without the callbacks given here, which cannot measure what is "
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

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Make the folder and keep other processes out of it.

        Raises:
            ConfigError: another process has it, or it cannot be written to.
        """
        self._made = self._acquire()
        try:
            yield
        finally:
            self._lock.release()

    @contextmanager
    def removed_on_failure(self) -> Iterator[None]:
        """Remove the folders that were made for this run if the block fails."""
        try:
            yield
        except BaseException:
            if self._made and dist.get_global_rank() == 0:
                shutil.rmtree(self._made[0], ignore_errors=True)
                with suppress(OSError):  # not empty: another run uses it by now
                    for path in self._made[1:]:
                        path.rmdir()
            raise

    @on_rank_zero
    def _acquire(self) -> list[Path]:
        made = [path for path in (self.path, *self.path.parents) if not path.exists()]
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock.acquire(timeout=0)
        except Timeout as error:
            raise ConfigError(
                f"{self.path}: another process trains this run; wait for it, or {_ELSEWHERE}"
            ) from error
        except OSError as error:
            raise self._not_writable(error) from error
        return made

    def prepare(self) -> str | None:
        """Write the settings. Return the checkpoint to continue from, if there is one.

        Raises:
            ConfigError: the folder cannot be written to, or a node does not see the checkpoint.
        """
        checkpoint = self._prepare()
        check_seen(checkpoint)
        return checkpoint

    @on_rank_zero
    def _prepare(self) -> str | None:
        config = yaml.safe_dump(self._recipe.settings(), sort_keys=False)
        latest = self.checkpoints / LATEST
        try:
            write_atomically(self.path / "config.yaml", config)
            # A kill may fall between the moments when Composer removes its link to the newest checkpoint and
            # makes it anew. A checkpoint that was being written lacks its end, and so is no zip file.
            whole = [path for path in self.checkpoints.glob(_CHECKPOINTS) if is_zipfile(path)]
            if whole and not latest.exists():
                latest.unlink(missing_ok=True)
                latest.symlink_to(max(whole, key=_steps).name)
        except OSError as error:
            raise self._not_writable(error) from error
        return str(latest.resolve()) if latest.exists() else None

    @on_rank_zero
    def remove_checkpoints(self, kept: Path) -> None:
        """Delete the checkpoints other than `kept` that an earlier process left when it was killed."""
        for left in set(kept.parent.glob(_CHECKPOINTS)) - {kept}:
            left.unlink()

    @on_rank_zero
    def write_results(self, state: State, log: RunLog) -> dict[str, Any]:
        """Draw the curves, write the results and return them."""
        draw_curves(log, self.path / "curves.png", steps_per_epoch=int(state.dataloader_len or 1))
        return write_results(self._recipe, state, log)

    def is_full(self) -> bool:
        """Return whether the disk has no room for another file."""
        return shutil.disk_usage(self.path).free < 2**20

    def _not_writable(self, error: OSError) -> ConfigError:
        return ConfigError(f"save_folder={self._recipe.save_folder}: cannot be written to: {error}")


def _holds_something(path: Path) -> bool:
    """Return whether there is a file here, or a folder with more than the lock of a run that never began."""
    return not path.is_dir() or any(entry.name != ".lock" for entry in path.iterdir())


def _differences(earlier: Recipe, now: Recipe) -> list[str]:
    """Return the settings that make another run, each with both values."""
    before, after = earlier.flat_settings(), now.flat_settings()
    return [
        f"{key} ({before.get(key)} there, {after.get(key)} here)"
        for key in sorted(before.keys() | after.keys())
        if key.split(".")[0] not in _NOT_COMPARED
        and (key in before, before.get(key)) != (key in after, after.get(key))
    ]


def _steps(checkpoint: Path) -> int:
    """Return the steps that had been taken, from the name of a checkpoint."""
    return int(re.findall(r"-ba(\d+)-", checkpoint.name)[0])


def check_seen(checkpoint: str | None) -> None:
    """Refuse a checkpoint on one node's own disk: every node loads it."""
    seen = dist.all_gather_object(checkpoint is None or Path(checkpoint).exists())
    if not all(seen):
        raise ConfigError(
            f"{checkpoint}: rank {seen.index(False)} does not see it; copy it there, or move the run to a "
            "disk that all nodes share"
        )
