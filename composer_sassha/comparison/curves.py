"""Read and draw learning curves: the mean over the seeds, with a band of one standard deviation."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import cycle, product
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullLocator

from composer_sassha.comparison.grid import GridRun
from composer_sassha.recipes.metrics import Metric, metrics_of, number
from composer_sassha.reporting.pictures import COLOURS, LINES

_EARLY = 0.3  # the axis of a metric that should be high covers the values after this fraction of the training


@dataclass
class Curve:
    """The metrics of one method at each evaluation that all seeds have; seeds are the first axis.

    Args:
        steps: at each evaluation, of shape [evaluations].
        epochs: the same in epochs; None if no epoch was completed.
        seconds: time spent in steps until then, of shape [seeds, evaluations].
        values: metrics by name, each of shape [seeds, evaluations].
    """

    steps: np.ndarray
    epochs: np.ndarray | None
    seconds: np.ndarray
    values: dict[str, np.ndarray]


def read_curve(runs: Sequence[GridRun]) -> Curve | None:
    """Return the curve of one method's finished runs; None without any.

    Args:
        runs: of one method, one for each seed.
    """
    seeds, epoch = [], 0
    for run in runs:
        if run.results is None:
            continue
        metrics = metrics_of(run.results)
        keys = [metric.logged(run.results["heldout"]) for metric in metrics]
        seconds, evaluations, records = 0.0, {}, run.records()
        for record in records:
            seconds += record.get("seconds", 0.0)
            if keys[0] in record:
                evaluations[record["batch"]] = [seconds, *(number(record.get(key)) for key in keys)]
        if any(record["epoch"] > 0 for record in records):
            epoch = sum("seconds" in record and record["epoch"] == 0 for record in records)
        if evaluations:
            seeds.append(evaluations)
    steps = sorted(set.intersection(*map(set, seeds))) if seeds else []
    if not steps:
        return None
    table = np.array([[one[step] for step in steps] for one in seeds], dtype=float)
    return Curve(
        steps=np.array(steps),
        epochs=np.array(steps) / epoch if epoch else None,
        seconds=table[:, :, 0],
        values={m.name: m.scale * table[:, :, i] for i, m in enumerate(metrics, start=1)},
    )


def plot_curves(curves: dict[str, Curve], metrics: Sequence[Metric], heldout: str, title: str) -> Figure:
    """Draw each metric against epochs and against seconds, with one legend for all.

    Args:
        curves: by method.
        metrics: one row of the figure for each.
        heldout: name of the evaluated part of the data.
        title: of the figure.
    """
    columns = 1 + len(curves) // 30  # of the legend
    figure = Figure(figsize=(11 + 1.5 * columns, 4 * len(metrics)), layout="constrained")
    figure.suptitle(title)
    grid = figure.subplots(len(metrics), 2, sharex="col", sharey="row", squeeze=False)
    in_epochs = all(curve.epochs is not None for curve in curves.values())
    for metric, (left, right) in zip(metrics, grid, strict=True):
        styles = cycle(product(LINES, COLOURS))
        for (method, curve), (line, colour) in zip(curves.items(), styles, strict=False):
            style = {"color": colour, "linestyle": line, "label": method}
            _line(left, curve.epochs if in_epochs else curve.steps, curve.values[metric.name], style)
            _line(right, curve.seconds.mean(axis=0), curve.values[metric.name], style)
        left.set_ylabel(f"{heldout} {metric.label}")
        _scale(left, metric, curves)
    grid[-1, 0].set_xlabel("epochs" if in_epochs else "steps")
    grid[-1, 1].set_xlabel("seconds in training steps")
    for axes in grid.flat:
        axes.grid(alpha=0.3)
        axes.set_xlim(left=0)
    handles, labels = grid[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", ncols=columns, handlelength=3.5)
    return figure


def _line(axes: Axes, x: Any, values: np.ndarray, style: dict[str, Any]) -> None:
    mean = values.mean(axis=0)
    marker = "o" if len(mean) == 1 else None  # a line through one point is invisible
    axes.plot(x, mean, linewidth=1.4, marker=marker, markersize=4, **style)
    if len(values) > 1:
        deviation = values.std(axis=0, ddof=1)
        axes.fill_between(x, mean - deviation, mean + deviation, color=style["color"], alpha=0.1, linewidth=0)


def _scale(axes: Axes, metric: Metric, curves: dict[str, Curve]) -> None:
    values = [curve.values[metric.name] for curve in curves.values()]
    if metric.best is min:
        axes.set_yscale("log")
        low, high = axes.get_ylim()
        if high < 10 * low:  # a range with one power of ten, or none
            axes.yaxis.set_major_locator(MaxNLocator(6))
            axes.yaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter("{x:g}")
        return
    # The values of the first epochs would take most of the range.
    late = np.concatenate([v[:, int(_EARLY * v.shape[1]) :].ravel() for v in values])
    if not np.isfinite(late).any():
        return
    low, high = np.nanmin(late), np.nanmax(late)
    margin = 0.05 * (high - low) or 1.0
    axes.set_ylim(low - margin, high + margin)
    axes.yaxis.set_major_locator(MaxNLocator(10, steps=[1, 2, 5, 10]))
