"""What accuracy costs: every method by the time of its steps, and which of them no other one beats."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import cycle
from statistics import median

import numpy as np
from matplotlib.figure import Figure

from composer_sassha.comparison.rows import Row
from composer_sassha.recipes.metrics import Metric
from composer_sassha.reporting.pictures import COLOURS

_MARKERS = "os^DvPX*"


@dataclass
class Point:
    """One method in the picture.

    Args:
        method: its name.
        seconds: that its training spends in steps, > 0.
        value: the mean of the metric over the seeds, as it is shown.
        deviation: the standard deviation over the seeds, or None with fewer than two.
    """

    method: str
    seconds: float
    value: float
    deviation: float | None = None


def points_of(rows: Sequence[Row], metric: Metric, clock: str) -> list[Point]:
    """The methods that have finished runs with a finite mean; of the runs' times the median.

    Args:
        rows: the table's.
        metric: the one that ranks.
        clock: which of the times, see `step_clock`.
    """
    return [
        Point(row.method, median(r["steps"] * r[clock] for r in row.results), value, row.deviation(metric))
        for row in rows
        if (value := row.mean(metric)) is not None and math.isfinite(value)
    ]


def frontier(points: Sequence[Point], metric: Metric) -> list[Point]:
    """The points that no cheaper one equals or beats in the mean, the cheapest first.

    >>> from composer_sassha.recipes.metrics import METRICS
    >>> methods = [Point("sgd", 1.0, 90.0), Point("slow", 3.0, 89.0), Point("sam", 2.0, 92.0)]
    >>> [point.method for point in frontier(methods, METRICS["MulticlassAccuracy"])]
    ['sgd', 'sam']
    """
    best: list[Point] = []
    # Between equals in time the better one comes first, and shuts the others out.
    for point in sorted(points, key=lambda p: (p.seconds, -p.value if metric.best is max else p.value)):
        if not best or metric.best(point.value, best[-1].value) != best[-1].value:
            best.append(point)
    return best


def plot_frontier(
    points: Sequence[Point], metric: Metric, heldout: str, title: str, baseline: str | None = None
) -> Figure:
    """Draw the metric against the seconds of a training, with a line through the frontier.

    Args:
        points: of at least one method.
        metric: the one that ranks.
        heldout: the name of the evaluated part of the data.
        title: of the figure.
        baseline: a method in whose time an axis at the top counts, if it is among the points.
    """
    figure = Figure(figsize=(9, 5), layout="constrained")
    axes = figure.subplots()
    best = frontier(points, metric)
    axes.step(
        [p.seconds for p in best], [p.value for p in best], where="post", color="#999999", linewidth=1.2
    )
    styles = cycle((marker, colour) for marker in _MARKERS for colour in COLOURS)
    for point, (marker, colour) in zip(points, styles, strict=False):
        axes.errorbar(
            point.seconds,
            point.value,
            yerr=point.deviation,
            fmt=marker,
            color=colour,
            # Those on the frontier are filled.
            markerfacecolor=colour if point in best else "white",
            markersize=7,
            capsize=3,
            linewidth=1,
            label=point.method,
        )
    axes.set(xlabel="seconds in training steps", ylabel=f"{heldout} {metric.label}", title=title)
    axes.set_xlim(left=0)
    axes.grid(alpha=0.3)
    base = next((p.seconds for p in points if p.method == baseline), None)
    if base is not None:
        top = axes.secondary_xaxis(
            "top", functions=(partial(np.multiply, 1 / base), partial(np.multiply, base))
        )
        top.set_xlabel(f"in units of {baseline}'s")
    figure.legend(loc="outside right upper", title="filled: no cheaper\none is as good")
    return figure
