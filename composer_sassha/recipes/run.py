"""Runs a recipe: builds the Trainer, trains or continues, and leaves the run folder behind."""

import json
import shutil
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from composer import Algorithm, Callback, Evaluator, Logger, State, Trainer
from composer.callbacks import LRMonitor
from composer.core.data_spec import default_split_batch
from composer.devices import DeviceCPU
from composer.models import ComposerModel
from composer.optim import ComposerScheduler
from composer.utils import dist, get_device, reproducibility
from filelock import FileLock
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from composer_sassha.algorithms import Schedule
from composer_sassha.algorithms.base import methods_of
from composer_sassha.common.validate import SettingError
from composer_sassha.optim import takes_curvature
from composer_sassha.recipes.config import Recipe
from composer_sassha.recipes.errors import ConfigError
from composer_sassha.recipes.folder import (
    check_seen,
    earlier_results,
    lock_folder,
    on_rank_zero,
    prepare_folder,
    read_results,
    removed_on_failure,
)
from composer_sassha.recipes.metrics import metrics_of, ranked
from composer_sassha.recipes.run_log import RunLog, number, step_clock, write_atomically

_EXTRAS = {"sklearn": "demo", "matplotlib": "demo", "scipy": "demo", "transformers": "nlp", "datasets": "nlp"}
_LOOK = 16  # samples of the first batch that the model has to take before anything is written


def train_recipe(recipe: Recipe, callbacks: Sequence[Callback] = ()) -> dict[str, Any]:
    """Train what the recipe says, or continue where an earlier call stopped, and return the results.

    The run folder gets `config.yaml`, `metrics.jsonl`, `checkpoints/`, `curves.png` and, when all is done,
    `results.json`, whose content is returned. A run that has it is left alone.

    Args:
        recipe: from `load_recipe`.
        callbacks: Composer callbacks beside the recipe's own.

    Raises:
        ConfigError: the recipe cannot be run, or its folder holds another run. Nothing was written.
    """
    if recipe.cpu_threads is not None:
        torch.set_num_threads(recipe.cpu_threads)
    with warnings.catch_warnings():
        # A schedule without warm-up is what the recipe asks for, the last batch may be a small one, and
        # smoothed labels may add up to a little less than 1. A rank correlation keeps all that is predicted.
        warnings.filterwarnings("ignore", message="The warmup duration is 0")
        warnings.filterwarnings("ignore", message="Cannot split tensor of length")
        warnings.filterwarnings("ignore", message="Some targets have less than 1 total probability")
        warnings.filterwarnings("ignore", message="Metric `SpearmanCorrcoef` will save all targets")
        parts = _build(recipe)
        if dist.get_world_size() > 1:
            dist.initialize_dist(get_device(None))
        results = on_rank_zero(lambda: earlier_results(recipe))
        if results is None:
            results = _train(recipe, parts, callbacks)
    return results


@dataclass
class _Parts:
    model: ComposerModel
    optimizer: Optimizer
    algorithms: list[Algorithm]
    callbacks: list[Callback]
    scheduler: ComposerScheduler | None
    train: DataLoader
    heldout: Evaluator


def _build(recipe: Recipe) -> _Parts:
    """Build all that can be built without writing, so that mistakes show before anything is written."""
    if recipe.precision != "fp32" and isinstance(get_device(None), DeviceCPU):
        raise ConfigError(f"precision={recipe.precision}: needs a GPU; this machine trains in fp32")
    with config_errors("curves.png"):
        import matplotlib.figure  # noqa: F401  # only at the end, but then it would be late to ask for it
    reproducibility.seed_all(recipe.seed)  # the Trainer seeds too, but the model is built before it
    with config_errors("data"):
        train, heldout = recipe.data.build(recipe.seed)
        _check_model(recipe)
    with config_errors("model"):
        model = recipe.model.build()
    with config_errors("optimizer"):
        optimizer = recipe.optimizer.build(model.parameters())
    algorithms = []
    for name, algorithm in recipe.algorithms.items():
        with config_errors(f"algorithms.{name}"):
            algorithms.append(algorithm.build())
    for name, schedule in recipe.schedules.items():
        with config_errors(f"schedules.{name}"):
            algorithms.append(Schedule(name, schedule.build()))
    callbacks = []
    for name, callback in recipe.callbacks.items():
        with config_errors(f"callbacks.{name}"):
            callbacks.append(callback.build())
    if takes_curvature(optimizer) and all(method.curvature is None for method in methods_of(algorithms)):
        raise ConfigError(
            f"algorithms: {type(optimizer).__name__} needs a Hessian; add algorithms.lazy_hessian={{}}, "
            "or algorithms.sassha={} or algorithms.msassha={}, which perturb as well"
        )
    with config_errors("schedulers"):
        scheduler = recipe.schedulers.build() if recipe.schedulers is not None else None
    try:
        with torch.no_grad():
            # On the CPU, where large models take seconds for a few samples.
            batch = default_split_batch(DeviceCPU().batch_to_device(next(iter(train))), _LOOK)[0]
            model.eval().loss(model(batch), batch)
    except (RuntimeError, IndexError, ValueError) as error:
        raise ConfigError(f"model: it does not fit the data: {error}") from error
    if isinstance(batch, Mapping) and "label_smoothing" in recipe.algorithms:  # which looks for batch[1]
        raise ConfigError("algorithms.label_smoothing: is not for texts; set algorithms.label_smoothing=null")
    return _Parts(model.train(), optimizer, algorithms, callbacks, scheduler, train, heldout)


def _check_model(recipe: Recipe) -> None:
    """Refuse a model that lacks what follows from the data, such as an output for every class."""
    follows = recipe.data.model_settings() if hasattr(recipe.data, "model_settings") else {}
    for key, value in follows.items():
        if not hasattr(recipe.model, key):
            names = {key: recipe.settings()[key]["name"] for key in ("data", "model")}
            raise ConfigError(f"model.name={names['model']}: is not for data.name={names['data']}")
        if (found := getattr(recipe.model, key)) != value:
            raise ConfigError(f"model.{key}={found}: does not fit the data; set model.{key}={value}")


@contextmanager
def config_errors(where: str) -> Iterator[None]:
    """What a constructor refuses, or an optional package that is missing, is a mistake in the recipe."""
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


def _train(recipe: Recipe, parts: _Parts, callbacks: Sequence[Callback]) -> dict[str, Any]:
    names = parts.heldout.metric_names or parts.model.get_metrics(is_train=False)
    log = RunLog(recipe.folder / "metrics.jsonl", parts.heldout.label, ranked(names), recipe.progress_bar)
    lock = FileLock(recipe.folder / ".lock")
    made = on_rank_zero(lambda: lock_folder(recipe, lock))
    try:
        with removed_on_failure(made):
            checkpoint = on_rank_zero(lambda: prepare_folder(recipe))
            check_seen(checkpoint)
            trainer = _trainer(recipe, parts, log, callbacks, checkpoint)
        try:
            return _fit(recipe, trainer, log)
        finally:
            trainer.close()
    finally:
        lock.release()


def _fit(recipe: Recipe, trainer: Trainer, log: RunLog) -> dict[str, Any]:
    state = trainer.state
    if state.load_path is not None and dist.get_global_rank() == 0:
        # Composer deletes old checkpoints of its own process only: add the one we continue from, and delete
        # what a kill has kept an earlier process from deleting.
        loaded = Path(state.load_path)
        trainer.saved_checkpoints.append(str(loaded))
        for left in set(loaded.parent.glob("ep*-ba*-rank0.pt")) - {loaded}:
            left.unlink()
    try:
        if state.timestamp < state.max_duration:
            trainer.fit()
        if not on_rank_zero(lambda: log.evaluated_at(state.timestamp)):
            trainer.eval()  # the run was stopped between its last checkpoint and its last evaluation
        return on_rank_zero(lambda: _write_results(recipe, trainer, log))
    except SettingError as error:
        raise ConfigError(str(error)) from error
    except (OSError, RuntimeError) as error:
        # What a full disk raises depends on who was writing.
        if shutil.disk_usage(recipe.folder).free < 2**20:
            raise ConfigError(
                f"{recipe.folder}: the disk is full; make room, and the same command continues from the last "
                "checkpoint"
            ) from error
        raise


def _trainer(
    recipe: Recipe, parts: _Parts, log: RunLog, callbacks: Sequence[Callback], checkpoint: str | None
) -> Trainer:
    try:
        return _new_trainer(recipe, parts, log, callbacks, checkpoint)
    except ConfigError:
        raise
    except Exception as error:
        if checkpoint is not None:
            raise ConfigError(
                f"{checkpoint}: cannot be loaded ({error}); restore it, or delete {recipe.folder} to "
                "start again"
            ) from error
        if isinstance(error, ValueError):
            raise ConfigError(f"Trainer: {error}") from error
        raise


def _new_trainer(
    recipe: Recipe, parts: _Parts, log: RunLog, callbacks: Sequence[Callback], checkpoint: str | None
) -> Trainer:
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
        save_folder=str(recipe.folder / "checkpoints"),
        save_interval=recipe.save_interval,
        save_overwrite=True,  # a file that a kill left half written is in the way otherwise
        save_num_checkpoints_to_keep=1,
        load_progress_bar=False,
    )


def _write_results(recipe: Recipe, trainer: Trainer, log: RunLog) -> dict[str, Any]:
    state = trainer.state
    _, measured = log.heldout()[-1]
    results = {
        "recipe": recipe.name,
        "method": recipe.method,
        "seed": recipe.seed,
        **measured,
        "metrics": [metric.torchmetric for metric in log.metrics],  # the first one ranks the methods
        "heldout": log.heldout_label,
        "reported": recipe.reported,
        "seconds": log.seconds(state.timestamp),
        "seconds_per_step": log.seconds_per_step(),
        "processor_seconds_per_step": log.seconds_per_step("processor_seconds"),
        "steps": state.timestamp.batch.value,
        "epochs": state.timestamp.epoch.value,
        "parameters": sum(p.numel() for p in state.model.parameters()),
        "world_size": dist.get_world_size(),
        "device": state.device.name,
    }
    log.plot(recipe.folder / "curves.png", steps_per_epoch=int(state.dataloader_len or 1))
    write_atomically(recipe.folder / "results.json", json.dumps(results, indent=2) + "\n")
    return results


def summary(recipe: Recipe, results: dict[str, Any]) -> str:
    """What the console says at the end of a run, with the step time relative to the baseline's if known."""
    heldout, loss, metrics = results["heldout"], results["loss"], metrics_of(results)
    measured = (f"{heldout} {metric.text(number(results[metric.name]))}" for metric in metrics)
    unit = " %" if metrics[0].percent else ""
    lines = [
        f"{recipe.name} {recipe.method} seed {recipe.seed}: {', '.join(measured)}"
        + (f" (reported: {recipe.reported}{unit})" if recipe.reported is not None else ""),
        f"trained for {results['seconds']:.1f} s, {results['steps']} steps, "
        f"{results['seconds_per_step']:.4f} s per step{_relative_to_baseline(recipe, results)}",
        f"run folder: {recipe.folder}",
    ]
    if loss is None:
        lines.append("the training diverged: its loss is not finite; try a smaller learning rate")
    return "\n".join(lines)


def _relative_to_baseline(recipe: Recipe, results: dict[str, Any]) -> str:
    if recipe.baseline in (None, recipe.method):
        return ""
    paths = recipe.folder.parents[1].glob(f"{recipe.baseline}/seed*/results.json")
    runs = [found for path in paths if (found := read_results(path)) is not None]
    same = [r for r in runs if all(r[key] == results[key] for key in ("world_size", "device"))]
    clock = step_clock([results, *same])
    return (
        f" ({results[clock] / median(r[clock] for r in same):.2f} times {recipe.baseline}'s)" if same else ""
    )
