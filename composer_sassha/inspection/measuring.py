"""Measure the sharpness of one finished run."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

import numpy as np
import torch
from composer.core import ensure_data_spec
from composer.models import ComposerModel
from composer.utils import get_device, reproducibility
from torch.utils.data import DataLoader, Subset
from tqdm import tqdm

from composer_sassha.callbacks.batches import take
from composer_sassha.common.validate import SettingError
from composer_sassha.inspection.extents import EIGEN_EXTENT, EXTENT, line_points
from composer_sassha.inspection.finished import Finished
from composer_sassha.inspection.options import Options
from composer_sassha.recipes.errors import ConfigError, config_errors
from composer_sassha.recipes.metrics import metrics_of
from composer_sassha.sharpness import (
    Measures,
    Objective,
    Unfinished,
    filter_normalized,
    interpolation,
    line,
    measure,
    objective_of,
    plane,
    spectrum,
    top_eigenpairs,
    undisturbed,
)
from composer_sassha.sharpness.measures import eigenvalue_metrics


def measure_run(run: Finished, options: Options, end: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """Measure the last checkpoint of a run.

    Args:
        run: the run.
        options: how to measure.
        end: state of the model at the other end of the interpolation.

    Returns:
        The entry of the run in sharpness.json.

    Raises:
        ConfigError: the run cannot be measured, in one line.
    """
    device = get_device(None)
    reproducibility.seed_all(0)  # so that all runs get the same samples, augmented in the same way
    with config_errors("data"):
        train, heldout = run.recipe.data.build(0)
        loader: Any = train if options.split == "train" else ensure_data_spec(heldout.dataloader).dataloader
        batches = take(ensure_data_spec(_sample(loader, options)), None, device)
    with config_errors("model"):
        model = device.module_to_device(run.recipe.model.build())
    _load(model, run)
    if {name: t.shape for name, t in model.state_dict().items()} != {
        name: t.shape for name, t in end.items()
    }:
        raise ConfigError(
            f"{run.folder}: has another model than the run that all are interpolated to; inspect it in a "
            "comparison of its own"
        )
    try:
        with undisturbed(model):
            objective = objective_of(model, batches)
            _try(objective, run)
            return {
                "method": run.recipe.method,
                "seed": run.recipe.seed,
                "score": run.results[metrics_of(run.results)[0].name],
                "version": run.version,
                **_numbers(str(run), objective, model, options, end),
            }
    except SettingError as error:
        raise ConfigError(f"{run.folder}: {error}") from error
    except torch.OutOfMemoryError as error:
        raise ConfigError(
            f"--batch-size={options.batch_size}: the device is out of memory; take fewer samples in one pass"
        ) from error


def _try(objective: Objective, run: Finished) -> None:
    try:
        objective.loss()
    except (RuntimeError, IndexError, ValueError) as error:
        raise ConfigError(f"{run.folder}: its model does not fit the data: {error}") from error


def _sample(loader: DataLoader, options: Options) -> DataLoader:
    """Draw samples of a loader's data set at random, as data on disk are often sorted by class."""
    data: Any = loader.dataset
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(0))
    chosen = Subset(data, order[: options.samples].tolist())
    return DataLoader(chosen, options.batch_size, collate_fn=loader.collate_fn)


def _load(model: ComposerModel, run: Finished) -> None:
    try:
        model.load_state_dict(run.state())
    except (RuntimeError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"{run.checkpoint}: does not fit the model of {run.folder / 'config.yaml'} ({error})"
        ) from error


def _numbers(
    name: str,
    objective: Objective,
    model: ComposerModel,
    options: Options,
    end: Mapping[str, torch.Tensor],
) -> dict[str, Any]:
    """Measure everything at one set of weights; leave out what is not finite."""
    found: dict[str, Any] = {"numbers": {}, "lines": {}, "plane": None, "spectrum": None}

    @contextmanager
    def part(what: str, evaluations: int | None) -> Iterator[None]:
        with tqdm(desc=f"{name}: {what}", total=evaluations, leave=False, disable=None) as bar:
            objective.tick = bar.update
            with suppress(Unfinished):
                yield

    first, second = (filter_normalized(objective, seed) for seed in (0, 1))
    at = line_points(options)
    across = np.linspace(-EXTENT, EXTENT, options.points // 2 + 1).tolist()
    measures = Measures(
        eigenvalues=0, rho=options.rho, asam_rho=options.asam_rho, trace_samples=options.trace_samples
    )
    with part("sharpness and trace", None):
        found["numbers"] |= measure(objective, measures)
    with part("eigenvalues", None):
        pairs = top_eigenpairs(objective)
        found["numbers"] |= eigenvalue_metrics(pairs.values.tolist())
        if len(pairs.vectors):
            top = torch.from_numpy(pairs.vectors[0]).to(first)
            found["lines"]["eigenvector"] = line(objective, top, [EIGEN_EXTENT * a for a in at]).tolist()
    with part("spectrum", options.steps * options.probes):
        density = spectrum(objective, options.steps, options.probes)
        found["spectrum"] = [density.eigenvalues.tolist(), density.weights.tolist()]
    with part("line", len(at)):
        found["lines"]["random"] = line(objective, first, at).tolist()
    with part("plane", len(across) ** 2):
        found["plane"] = plane(objective, first, second, across, across).tolist()
    with part("interpolation", len(at)):
        way = [(1 + a) / 2 for a in at]
        found["lines"]["interpolation"] = interpolation(objective, model, end, way).tolist()
    return found
