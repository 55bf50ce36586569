"""Measure the runs that are not measured yet, and write what is found."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from composer_sassha.inspection.finished import Finished, comparison_folder, find_run
from composer_sassha.inspection.measuring import measure_run
from composer_sassha.inspection.options import Options
from composer_sassha.inspection.pictures import draw_pictures
from composer_sassha.inspection.record import earlier_record, read_record, write_record
from composer_sassha.recipes.metrics import METRICS, metrics_of, number


def inspect_runs(
    folders: Sequence[Path], overrides: Sequence[str], options: Options
) -> tuple[Path, list[Finished]]:
    """Measure runs, and write `sharpness.json` and the pictures.

    Args:
        folders: of finished runs of one comparison.
        overrides: `data.key=value`.
        options: how to measure.

    Returns:
        The folder of the comparison, where all this lies, and the runs.

    Raises:
        ConfigError: a run cannot be measured. Nothing is written for it.
    """
    runs = [find_run(folder, overrides) for folder in folders]
    home = comparison_folder(runs)
    path = home / "sharpness.json"
    found = earlier_record(path, options) or {
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
            found["runs"][str(run)] = measure_run(run, options, end)
            write_record(path, found)
    draw_pictures(read_record(path), home)
    return home, runs


def _reference(home: Path, name: str, runs: Sequence[Finished], overrides: Sequence[str]) -> Finished:
    """Return the run at the other end of every interpolation."""
    for run in runs:
        if str(run) == name:
            return run
    return find_run(home / name, overrides)
