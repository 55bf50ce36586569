"""Finished runs, measured after the training: what `python -m composer_sassha inspect` does."""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from zipfile import is_zipfile

import numpy as np
import torch
from composer.core import ensure_data_spec
from composer.models import ComposerModel
from composer.utils import get_device, reproducibility
from torch.utils.data import DataLoader, Subset
from tqdm import tqdm

from composer_sassha.callbacks.batches import take
from composer_sassha.common.validate import SettingError
from composer_sassha.comparison.grid import Run
from composer_sassha.comparison.report import Report
from composer_sassha.inspection.options import Options
from composer_sassha.inspection.section import draw, section, table
from composer_sassha.recipes.config import Recipe, load_recipe
from composer_sassha.recipes.errors import ConfigError, config_errors
from composer_sassha.recipes.files import write_atomically
from composer_sassha.recipes.folder import LATEST
from composer_sassha.recipes.metrics import METRICS, metrics_of, number
from composer_sassha.recipes.results import read_results
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

EXTENT = 1.0  # of lines and planes along filter-normalized directions, to each side
EIGEN_EXTENT = 0.5  # along eigenvectors, which have length 1
DAMAGED = "is damaged; delete it, and the same command measures again"


@dataclass
class Finished:
    """A finished run.

    Args:
        folder: where it lies; a run may have been moved since its settings were written.
        recipe: its settings.
        results: the content of its results.json.
        checkpoint: the newest.
    """

    folder: Path
    recipe: Recipe
    results: dict[str, Any]
    checkpoint: Path

    def __str__(self) -> str:
        return f"{self.recipe.method}/seed{self.recipe.seed}"

    @property
    def version(self) -> list[Any]:
        """What tells this checkpoint from one that the same run has after training again."""
        status = self.checkpoint.stat()
        return [self.checkpoint.name, status.st_size, status.st_mtime_ns]

    def state(self) -> dict[str, torch.Tensor]:
        """The model's state in the checkpoint."""
        try:
            return torch.load(self.checkpoint, map_location="cpu", weights_only=False)["state"]["model"]
        except Exception as error:  # whatever a damaged or foreign file makes of unpickling
            raise ConfigError(f"{self.checkpoint}: cannot be loaded ({error}); restore it") from error


def find_run(folder: Path, overrides: Sequence[str] = ()) -> Finished:
    """Look at a run folder.

    Args:
        folder: with config.yaml, results.json and checkpoints/.
        overrides: `data.key=value`, for a data set that lies elsewhere now.

    Raises:
        ConfigError: it is not a run, or an unfinished one, or lacks a checkpoint; in one line.
    """
    config = folder / "config.yaml"
    if not config.is_file():
        there = "is not the folder of a run" if folder.is_dir() else "there is no such folder"
        raise ConfigError(f"{folder}: {there}; name one such as runs/digits/sgd/seed0")
    for override in overrides:
        if not override.startswith("data."):
            raise ConfigError(
                f"{override}: only settings of the data can be others here, such as data.root=..."
            )
    try:
        recipe = load_recipe(config, overrides)
    except ConfigError as error:
        raise ConfigError(f"{folder}: holds a run that cannot be read ({error})") from error
    results = folder / "results.json"
    if not results.exists():
        raise ConfigError(
            f"{folder}: is not finished; python -m composer_sassha train {config} goes on with it"
        )
    found = read_results(results)
    if found is None:
        raise ConfigError(f"{results}: is damaged; delete it, and training the run again writes it again")
    checkpoints = folder / "checkpoints"
    newest = checkpoints / LATEST
    whole = [newest] if newest.exists() else [*checkpoints.glob("ep*-ba*-rank0.pt")]
    whole = [path.resolve() for path in whole if is_zipfile(path)]
    if not whole:
        raise ConfigError(f"{checkpoints}: has no checkpoint that can be read; restore it")
    return Finished(folder, recipe, found, max(whole, key=lambda path: path.stat().st_mtime_ns))


def inspect_runs(folders: Sequence[Path], overrides: Sequence[str], options: Options, command: str) -> str:
    """Measure runs, and write `sharpness.json`, the pictures and the section of `report.html`.

    Args:
        folders: of finished runs of one comparison.
        overrides: `data.key=value`.
        options: how to measure.
        command: that does this.

    Returns:
        The table, and where the report is.

    Raises:
        ConfigError: a run that cannot be measured, in one line. Nothing was written for it.
    """
    runs = [find_run(folder, overrides) for folder in folders]
    home = _home(runs)
    path = home / "sharpness.json"
    found = _earlier(path, options) or {
        "options": asdict(options),
        "heldout": runs[0].results["heldout"],
        "metric": metrics_of(runs[0].results)[0].torchmetric,
        "baseline": runs[0].recipe.baseline,
        "reference": str(runs[0]),
        "runs": {},
    }
    left = [run for run in runs if found["runs"].get(str(run), {}).get("version") != run.version]
    if left:
        end = _reference(home, found["reference"], runs, overrides).state()
        for run in left:
            metric = METRICS[found["metric"]]
            print(f"{run}: {metric.text(number(run.results[metric.name]))}", flush=True)
            found["runs"][str(run)] = _measured(run, options, end)
            write_atomically(path, json.dumps(_plain(found)) + "\n")
    draw(_read(path), home)
    _write_section(home, runs, command)
    return f"{table(_read(path)).markdown()}\n\nreport: {home / 'report.html'}"


def _home(runs: Sequence[Finished]) -> Path:
    homes = {run.folder.resolve().parents[1]: run for run in runs}
    if len(homes) > 1:
        first, second = [str(run.folder) for run in homes.values()][:2]
        raise ConfigError(f"{first} and {second}: are of two comparisons; inspect one at a time")
    return next(iter(homes))


def _earlier(path: Path, options: Options) -> dict[str, Any] | None:
    """What was measured before, if anything, with the same options."""
    if not path.exists():
        return None
    found = _read(path)
    for name, now in asdict(options).items():
        if (before := found["options"].get(name)) != now:
            raise ConfigError(
                f"{path}: was measured with another {name} ({before} there, {now} here); use the same, or "
                "move that file away"
            )
    return found


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        found["runs"], found["options"]["samples"], found["reference"], found["heldout"], found["metric"]
        return found
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path}: {DAMAGED}") from error


def _reference(home: Path, name: str, runs: Sequence[Finished], overrides: Sequence[str]) -> Finished:
    """The run at the other end of every interpolation."""
    for run in runs:
        if str(run) == name:
            return run
    return find_run(home / name, overrides)


def _measured(run: Finished, options: Options, end: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    device = get_device(None)
    reproducibility.seed_all(0)  # the same samples, augmented in the same way, for all runs
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
    """Some samples of a loader's data set, drawn at random: data on disk are often sorted by class."""
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
    """All that is measured at one set of weights; what is not finite is left out."""
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


def line_points(options: Options) -> list[float]:
    """Where the lines are measured, from -1 to 1, in units of each line's extent."""
    return np.linspace(-1.0, 1.0, options.points).tolist()


def _plain(tree: Any) -> Any:
    """Replace what JSON does not have: a number that is not finite becomes None."""
    if isinstance(tree, Mapping):
        return {key: _plain(value) for key, value in tree.items()}
    if isinstance(tree, list):
        return [_plain(value) for value in tree]
    return None if isinstance(tree, float) and not math.isfinite(tree) else tree


def _write_section(home: Path, runs: Sequence[Finished], command: str) -> None:
    """Put the section into the report that is there, or write one of these runs."""
    path = home / "report.html"
    if not path.exists():
        Report([Run(run.recipe, run.results) for run in runs], command).write(home)
        return
    text = path.read_text(encoding="utf-8")
    write_atomically(path, with_section(text, section(home)))


def with_section(report: str, found: str) -> str:
    """Put the section in the place of an earlier one, or else at the end.

    Args:
        report: the page.
        found: from `section`, with its markers.

    >>> with_section("<p>1</p></body>", "<!-- sharpness -->new<!-- /sharpness -->")
    '<p>1</p><!-- sharpness -->new<!-- /sharpness --></body>'
    >>> with_section("<p>1</p><!-- sharpness -->old<!-- /sharpness --></body>", "<!-- sharpness -->...")
    '<p>1</p><!-- sharpness -->...</body>'
    """
    begin, end = "<!-- sharpness -->", "<!-- /sharpness -->"
    before, marker, rest = report.partition(begin)
    if not marker:
        before, _, rest = report.rpartition("</body>")
        return f"{before}{found}</body>{rest}"
    return before + found + rest.partition(end)[2]
