"""The rows of a comparison: each method, with what its seeds add up to."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from statistics import median
from typing import Any

import numpy as np

from composer_sassha.comparison.grid import GridRun
from composer_sassha.recipes.metrics import Metric, number


@dataclass
class Row:
    """One method: its runs, and the results of those that are finished."""

    method: str
    runs: list[GridRun]

    @property
    def results(self) -> list[dict[str, Any]]:
        """Return the content of each results.json that there is."""
        return [run.results for run in self.runs if run.results is not None]

    @property
    def reported(self) -> float | None:
        """Return the published value of the metric that ranks, as it is shown."""
        return self.runs[0].recipe.reported

    def values(self, metric: Metric) -> list[float]:
        """Return the metric of each finished run, as it is shown; NaN where it was not finite."""
        return [metric.scale * number(r.get(metric.name)) for r in self.results]

    def mean(self, metric: Metric) -> float | None:
        """Return the mean over the seeds; None without any."""
        values = self.values(metric)
        return float(np.mean(values)) if values else None

    def deviation(self, metric: Metric) -> float | None:
        """Return the sample's standard deviation over the seeds; None with fewer than two."""
        values = self.values(metric)
        return float(np.std(values, ddof=1)) if len(values) > 1 else None

    def cost(self, baseline: Sequence[dict[str, Any]], clock: str) -> list[float]:
        """Return the step time of each run, in units of the baseline's median on equal machines.

        Args:
            baseline: results of its runs.
            clock: key of the time that counts, from `step_clock`.
        """
        costs = []
        for run in self.results:
            same = [r for r in baseline if all(r[key] == run[key] for key in ("device", "world_size"))]
            if same:
                costs.append(run[clock] / median(r[clock] for r in same))
        return costs

    @cached_property
    def skipped_steps(self) -> int:
        """Return the number of steps that changed nothing, over all finished runs."""
        # Each has a record of its own. The count in it restarts when a run is continued, so records count.
        finished = (run for run in self.runs if run.results is not None)
        return sum(
            any(key.endswith("/skipped_steps") for key in r) for run in finished for r in run.records()
        )


def rows_of(runs: Iterable[GridRun]) -> list[Row]:
    """Return one row for each method, in the order of the runs."""
    rows: dict[str, Row] = {}
    for run in runs:
        rows.setdefault(run.recipe.method, Row(run.recipe.method, [])).runs.append(run)
    return list(rows.values())


def best_rows(rows: Sequence[Row], metric: Metric) -> list[Row]:
    """Return the rows with the best mean, among those with the largest number of seeds."""
    seeds = max(len(row.results) for row in rows)
    means = [
        (row, mean) for row in rows if len(row.results) == seeds and (mean := row.mean(metric)) is not None
    ]
    finite = [(row, mean) for row, mean in means if math.isfinite(mean)]
    if not finite:
        return []
    best = metric.best(mean for _, mean in finite)
    return [row for row, mean in finite if math.isclose(mean, best, rel_tol=1e-9)]


def winner(rows: Sequence[Row], metrics: Sequence[Metric]) -> Row | None:
    """Return the best row in the first metric, between equals in the last; None without a finite mean."""
    best = best_rows(rows, metrics[0])
    return (best_rows(best, metrics[-1]) or best)[0] if best else None
