"""Train a recipe, or continue it, in its run folder."""

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from composer import Callback, Logger, State, Trainer
from composer.callbacks import LRMonitor
from composer.utils import dist, get_device

from composer_sassha.common.validate import SettingError
from composer_sassha.recipes.build import Parts, build_parts
from composer_sassha.recipes.config import Recipe
from composer_sassha.recipes.errors import ConfigError
from composer_sassha.recipes.folder import RunFolder
from composer_sassha.recipes.metrics import ranked
from composer_sassha.recipes.run_log import RunLog

# A schedule without warm-up is what the recipe asks for, the last batch may be a small one, and smoothed
# labels may add up to a little less than 1. A rank correlation keeps all predictions.
_EXPECTED_WARNINGS = (
    "The warmup duration is 0",
    "Cannot split tensor of length",
    "Some targets have less than 1 total probability",
    "Metric `SpearmanCorrcoef` will save all targets",
)


def train_recipe(recipe: Recipe, callbacks: Sequence[Callback] = ()) -> dict[str, Any]:
    """Train a recipe, or continue where an earlier call stopped, and return the results.

    The run folder gets `config.yaml`, `metrics.jsonl`, `checkpoints/`, `curves.png` and, at the end,
    `results.json`, whose content is returned. A run that has it is left alone.

    Args:
        recipe: from `load_recipe`.
        callbacks: Composer callbacks in addition to the recipe's own.

    Raises:
        ConfigError: the recipe cannot be run, or its folder holds another run. Nothing was written.
    """
    if recipe.cpu_threads is not None:
        torch.set_num_threads(recipe.cpu_threads)
    with warnings.catch_warnings():
        for message in _EXPECTED_WARNINGS:
            warnings.filterwarnings("ignore", message=message)
        parts = build_parts(recipe)
        if dist.get_world_size() > 1:
            dist.initialize_dist(get_device(None))
        folder = RunFolder(recipe)
        results = folder.earlier_results()
        if results is None:
            results = _train(recipe, parts, folder, callbacks)
    return results


class RankZeroBuffers(Callback):
    """Evaluates with rank 0's buffers on every rank.

    Between two steps each rank has BatchNorm statistics of its own, and a checkpoint keeps rank 0's alone:
    without this, an evaluation right after resuming would come out slightly different.
    """

    def eval_before_all(self, state: State, logger: Logger) -> None:
        """Broadcast the buffers."""
        for buffer in state.model.buffers():
            dist.broadcast(buffer, src=0)

    eval_standalone_start = eval_before_all


def _train(recipe: Recipe, parts: Parts, folder: RunFolder, callbacks: Sequence[Callback]) -> dict[str, Any]:
    names = parts.heldout.metric_names or parts.model.get_metrics(is_train=False)
    log = RunLog(folder.path / "metrics.jsonl", parts.heldout.label, ranked(names), recipe.progress_bar)
    with folder.locked():
        with folder.removed_on_failure():
            checkpoint = folder.prepare()
            trainer = _trainer(recipe, parts, folder, log, callbacks, checkpoint)
        try:
            return _fit(trainer, folder, log)
        finally:
            trainer.close()


def _fit(trainer: Trainer, folder: RunFolder, log: RunLog) -> dict[str, Any]:
    state = trainer.state
    if state.load_path is not None:
        if dist.get_global_rank() == 0:
            # Composer deletes old checkpoints of its own process only: add the one that the run loaded.
            trainer.saved_checkpoints.append(state.load_path)
        folder.remove_checkpoints(kept=Path(state.load_path))
    try:
        if state.timestamp < state.max_duration:
            trainer.fit()
        if not log.is_evaluated(state.timestamp):
            trainer.eval()  # the run was stopped between its last checkpoint and its last evaluation
        return folder.write_results(state, log)
    except SettingError as error:
        raise ConfigError(str(error)) from error
    except (OSError, RuntimeError) as error:
        # What a full disk raises depends on the writer: torch raises RuntimeError.
        if folder.is_full():
            raise ConfigError(
                f"{folder.path}: the disk is full; make room, and the same command continues from the last "
                "checkpoint"
            ) from error
        raise


def _trainer(
    recipe: Recipe,
    parts: Parts,
    folder: RunFolder,
    log: RunLog,
    callbacks: Sequence[Callback],
    checkpoint: str | None,
) -> Trainer:
    try:
        return Trainer(
            model=parts.model,
            train_dataloader=parts.train,
            eval_dataloader=parts.heldout,
            optimizers=parts.optimizer,
            schedulers=parts.scheduler,
            algorithms=parts.algorithms,
            callbacks=[LRMonitor(), RankZeroBuffers(), *parts.callbacks, *callbacks],
            loggers=log,
            max_duration=recipe.max_duration,
            eval_interval=recipe.eval_interval,
            precision=recipe.precision,
            device_train_microbatch_size=recipe.device_train_microbatch_size,
            seed=recipe.seed,
            deterministic_mode=recipe.deterministic,
            progress_bar=False,  # the log has one for the whole run
            run_name=f"{recipe.name}-{recipe.method}-seed{recipe.seed}",
            load_path=checkpoint,  # autoresume=True fails on several nodes that share a disk
            save_folder=str(folder.checkpoints),
            save_interval=recipe.save_interval,
            save_overwrite=True,  # a file that a kill left half written is in the way otherwise
            save_num_checkpoints_to_keep=1,
            load_progress_bar=False,
        )
    except ConfigError:
        raise
    except Exception as error:
        if checkpoint is not None:
            raise ConfigError(
                f"{checkpoint}: cannot be loaded ({error}); restore it, or delete {folder.path} "
                "to start again"
            ) from error
        if isinstance(error, ValueError):
            raise ConfigError(f"Trainer: {error}") from error
        raise
