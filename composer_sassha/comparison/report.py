"""The report of a comparison: table.md, table.csv, curves.png, frontier.png and report.html."""

import csv
import io
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from jinja2 import Environment, PackageLoader
from markupsafe import Markup

from composer_sassha.comparison.curves import plot_curves, read_curve
from composer_sassha.comparison.fairness import compared_settings, unfair_differences
from composer_sassha.comparison.grid import GridRun
from composer_sassha.comparison.pareto import outcomes_of, plot_pareto_front
from composer_sassha.comparison.rows import Row, best_rows, rows_of, winner
from composer_sassha.recipes.files import write_atomically
from composer_sassha.recipes.metrics import Metric, metrics_of
from composer_sassha.recipes.results import step_clock
from composer_sassha.reporting.pictures import base64_text, png_bytes, write_png
from composer_sassha.reporting.significance import LEVEL, welch
from composer_sassha.reporting.tables import NOTHING, Best, Table, mean_and_deviation


@dataclass
class Report:
    """The results of a comparison.

    Args:
        runs: runs of the grid.
        command: the command that makes this report.
    """

    runs: list[GridRun]
    command: str
    rows: list[Row] = field(init=False)

    def __post_init__(self) -> None:
        self.unfair = unfair_differences(self.runs)
        self.rows = rows_of(self.runs)
        self.finished = [run.results for run in self.runs if run.results is not None]
        self.heldout = self.finished[0]["heldout"] if self.finished else "held-out"
        self.metrics = metrics_of(self.finished[0]) if self.finished else ()
        self.winner = winner(self.rows, self.metrics) if self.finished else None
        self.baseline = self.runs[0].recipe.baseline
        of_baseline = [row.results for row in self.rows if row.method == self.baseline]
        self._baseline_results = of_baseline[0] if of_baseline else []
        self._clock = step_clock(self.finished)
        self.p_values = {
            row.method: welch(row.values(self.metrics[0]), self.winner.values(self.metrics[0]))
            for row in self.rows
            if self.winner is not None and row is not self.winner
        }
        # A bound for all tests together (Bonferroni's).
        tests = [p for p in self.p_values.values() if p is not None]
        self.level = LEVEL / max(1, len(tests))

    def table(self) -> Table:
        """Return the results, one row for each method."""
        columns = {"method": [row.method for row in self.rows], "seeds": [_seeds(row) for row in self.rows]}
        means = {f"{self.heldout} {metric.label}": self._means(metric) for metric in self.metrics}
        columns |= dict(list(means.items())[:1])  # published values are of the first metric
        if any(row.reported is not None for row in self.rows):
            unit = ", %" if self.metrics and self.metrics[0].percent else ""
            digits = self.metrics[0].digits if self.metrics else 2
            columns[f"published{unit}"] = [_or_nothing(row.reported, f".{digits}f") for row in self.rows]
        columns |= means
        columns[f"p (against {self.winner.method})" if self.winner else "p"] = [self._p(r) for r in self.rows]
        columns["training, s"] = [_median(row, "seconds", 1) for row in self.rows]
        columns["step, ms"] = [_median(row, "seconds_per_step", 1000) for row in self.rows]
        if self._baseline_results:
            costs = [_range(row.cost(self._baseline_results, self._clock)) for row in self.rows]
            columns[f"step / {self.baseline}'s (range)"] = costs
        columns["skipped"] = [str(row.skipped_steps) if row.results else NOTHING for row in self.rows]
        return Table(list(columns), [list(cells) for cells in zip(*columns.values(), strict=True)])

    def _means(self, metric: Metric) -> list[str]:
        best = best_rows(self.rows, metric)
        cells = [
            mean_and_deviation(row.mean(metric), row.deviation(metric), metric.digits) for row in self.rows
        ]
        return [Best(cell) if row in best else cell for row, cell in zip(self.rows, cells, strict=True)]

    def _p(self, row: Row) -> str:
        if row is self.winner:
            return "best"
        p = self.p_values.get(row.method)
        return NOTHING if p is None else f"{p:.2g}{'*' if p < self.level else ' n.s.'}"

    def notes(self) -> list[str]:
        """Return what the table says, and what limits it."""
        notes = [
            "Mean ± standard deviation over the seeds, the best mean in bold; medians of the times. Runs "
            "that train at the same time slow each other down: compare times with --jobs 1."
        ]
        if self._clock == "processor_seconds_per_step" and self._baseline_results:
            notes.append("Relative times are of the processor, which other programs lengthen little.")
        if self.winner is not None and len(self.rows) > 1:
            notes += self._significance(self.winner.method)
        if not self._baseline_results and self.baseline is not None:
            notes.append(f"No relative times: {self.baseline}, the baseline, has no finished run here.")
        lists = {
            "Diverged, the loss is not finite": [
                str(r) for r in self.runs if r.results and r.results["loss"] is None
            ],
            "Missing": self._missing(),
        }
        return notes + _said(lists)

    def _missing(self) -> list[str]:
        seeds = defaultdict(list)
        for run in (run for run in self.runs if run.results is None):
            seeds[run.recipe.method, run.state].append(str(run.recipe.seed))
        return [
            f"{method} seed{'s' * (len(found) > 1)} {', '.join(found)} ({state})"
            for (method, state), found in seeds.items()
        ]

    def _significance(self, best: str) -> list[str]:
        tested = {method: p for method, p in self.p_values.items() if p is not None}
        few = [row.method for row in self.rows if len(row.results) < 2]
        lists = {
            f"Significantly different from {best}": [m for m, p in tested.items() if p < self.level],
            f"Not significantly different from {best}": [m for m, p in tested.items() if p >= self.level],
            "Too few seeds for a test (n < 2)": few,
            "No test, as the seeds do not vary": [
                m for m in self.p_values if m not in tested and not {m, best} & set(few)
            ],
        }
        if not tested:
            return _said(lists)
        what, count = self.metrics[0].name, len(tested)
        limit = f"{LEVEL}/{count} = {self.level:.2g}" if count > 1 else str(LEVEL)
        return [
            f"p: Welch's t-test of the {what} against {best}'s, {count} in all; significant (*) is "
            f"p < {limit}, others are not (n.s.).",
            *_said(lists),
        ]

    def settings(self) -> Table:
        """Return the settings that are compared."""
        rows = compared_settings(self.runs)
        head = list(next(iter(rows.values())))
        cells = [[method, *(row[key] or NOTHING for key in head)] for method, row in rows.items()]
        return Table(["method", *head], cells, prose=True)

    @property
    def intro(self) -> str:
        """Return the introduction to the table of settings."""
        same = " All other settings are the same." if len(self.rows) > 1 and not self.unfair else ""
        return f"What the methods set, without what all of them leave at its default.{same}"

    def settings_text(self) -> str:
        """Return the settings that differ, and a warning for each that should not, in Markdown."""
        warnings = [f"warning: {line}" for line in self.unfair]
        return "\n\n".join([self.intro, self.settings().markdown(), *warnings]) + "\n"

    def results_text(self) -> str:
        """Return the table and the notes in Markdown."""
        return "\n".join([self.table().markdown(), "", *(f"- {note}" for note in self.notes())]) + "\n"

    def csv(self) -> str:
        """Return the table as plain numbers, with empty fields where there are none."""
        rows = []
        for row in self.rows:
            costs = row.cost(self._baseline_results, self._clock)
            cells: dict[str, Any] = {"method": row.method, "seeds": len(row.results)}
            for metric in self.metrics:
                unit = "_percent" if metric.percent else ""
                cells[f"{metric.name}{unit}_mean"] = row.mean(metric)
                cells[f"{metric.name}{unit}_std"] = row.deviation(metric)
                if metric is self.metrics[0]:
                    cells[f"reported{unit}"] = row.reported
            cells["p_against_best"] = self.p_values.get(row.method)
            for key in ("seconds", "seconds_per_step"):
                cells[f"{key}_median"] = median(r[key] for r in row.results) if row.results else None
            for name, of in (("median", median), ("min", min), ("max", max)):
                cells[f"relative_step_time_{name}"] = of(costs) if costs else None
            cells["skipped_steps"] = row.skipped_steps if row.results else None
            rows.append(cells)
        text = io.StringIO()
        writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        return text.getvalue()

    def write(self, folder: Path, sections: Sequence[str] = ()) -> None:
        """Write all files.

        Args:
            folder: for the files.
            sections: HTML that the page shows before the settings.
        """
        name = self.runs[0].recipe.name
        curves = {row.method: curve for row in self.rows if (curve := read_curve(row.runs)) is not None}
        pictures = {}
        if curves:
            pictures["curves"] = png_bytes(plot_curves(curves, self.metrics, self.heldout, name))
        if len(outcomes := outcomes_of(self.rows, self.metrics[0], self._clock)) > 1:
            pictures["frontier"] = png_bytes(
                plot_pareto_front(outcomes, self.metrics[0], self.heldout, name, self.baseline)
            )
        page = Environment(loader=PackageLoader("composer_sassha", "comparison"), autoescape=True)
        page.tests["best"] = lambda cell: isinstance(cell, Best)
        html = page.get_template("report.html").render(
            report=self,
            name=name,
            each_run=self._each_run(),
            pictures={key: base64_text(png) for key, png in pictures.items()},
            sections=[Markup(section) for section in sections],
        )
        write_atomically(folder / "table.md", f"# {name}\n\n{self.results_text()}\n{self.settings_text()}")
        write_atomically(folder / "table.csv", self.csv())
        write_atomically(folder / "report.html", html)
        for key, png in pictures.items():
            write_png(png, folder / f"{key}.png")

    def _each_run(self) -> Table:
        head = [
            "run",
            *(f"{self.heldout} {m.label}" for m in self.metrics),
            "training, s",
            "step, ms",
            "steps",
        ]
        rows = []
        for run in self.runs:
            if (results := run.results) is None:
                rows.append([str(run), run.state, *[NOTHING] * (len(head) - 2)])
                continue
            single = Row(run.recipe.method, [run])
            values = [mean_and_deviation(single.mean(metric), None, metric.digits) for metric in self.metrics]
            times = [f"{results['seconds']:.1f}", f"{1000 * results['seconds_per_step']:.1f}"]
            rows.append([str(run), *values, *times, str(results["steps"])])
        return Table(head, rows)


def _said(lists: dict[str, list[str]]) -> list[str]:
    return [f"{what}: {', '.join(names)}." for what, names in lists.items() if names]


def _seeds(row: Row) -> str:
    there, wanted = len(row.results), len(row.runs)
    return str(there) if there == wanted else f"{there} of {wanted}"


def _or_nothing(value: float | None, form: str) -> str:
    return NOTHING if value is None else format(value, form)


def _median(row: Row, key: str, scale: float) -> str:
    return f"{scale * median(r[key] for r in row.results):.1f}" if row.results else NOTHING


def _range(costs: Sequence[float]) -> str:
    if not costs:
        return NOTHING
    return f"{median(costs):.2f}" + (f" ({min(costs):.2f} to {max(costs):.2f})" if len(costs) > 1 else "")
