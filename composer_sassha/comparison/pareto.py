"""What accuracy costs: every method by the time of its training, and the Pareto front of them."""

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
class Outcome:
    """The cost and the result of one method.

    Args:
        method: its name.
        seconds: time that its training spends in steps, above 0.
        value: mean of the metric over the seeds, as it is shown.
        deviation: standard deviation over the seeds; None with fewer than two.
    """

    method: str
    seconds: float
    value: float
    deviation: float | None = None


def outcomes_of(rows: Sequence[Row], metric: Metric, clock: str) -> list[Outcome]:
    """Return the outcome of every method with a finite mean; its time is the median over the runs.

    Args:
        rows: the table's.
        metric: the one that ranks.
        clock: key of the time that counts, from `step_clock`.
    """
    return [
        Outcome(row.method, median(r["steps"] * r[clock] for r in row.results), value, row.deviation(metric))
        for row in rows
        if (value := row.mean(metric)) is not None and math.isfinite(value)
    ]


def pareto_front(outcomes: Sequence[Outcome], metric: Metric) -> list[Outcome]:
    """Return the outcomes that no cheaper one equals or beats in the mean, the cheapest first.

    Args:
        outcomes: of the methods.
        metric: the one that ranks.

    >>> from composer_sassha.recipes.metrics import METRICS
    >>> methods = [Outcome("sgd", 1.0, 90.0), Outcome("slow", 3.0, 89.0), Outcome("sam", 2.0, 92.0)]
    >>> [outcome.method for outcome in pareto_front(methods, METRICS["MulticlassAccuracy"])]
    ['sgd', 'sam']
    """
    best: list[Outcome] = []
    # Between equals in time the better one comes first, and excludes the others.
    for outcome in sorted(outcomes, key=lambda o: (o.seconds, -o.value if metric.best is max else o.value)):
        if not best or metric.best(outcome.value, best[-1].value) != best[-1].value:
            best.append(outcome)
    return best


def plot_pareto_front(
    outcomes: Sequence[Outcome], metric: Metric, heldout: str, title: str, baseline: str | None = None
) -> Figure:
    """Draw the metric against the seconds of a training, with a line through the Pareto front.

    Args:
        outcomes: of at least one method.
        metric: the one that ranks.
        heldout: name of the evaluated part of the data.
        title: of the figure.
        baseline: method whose time is the unit of an axis at the top, if it has an outcome.
    """
    figure = Figure(figsize=(9, 5), layout="constrained")
    axes = figure.subplots()
    best = pareto_front(outcomes, metric)
    axes.step(
        [o.seconds for o in best], [o.value for o in best], where="post", color="#999999", linewidth=1.2
    )
    styles = cycle((marker, colour) for marker in _MARKERS for colour in COLOURS)
    for outcome, (marker, colour) in zip(outcomes, styles, strict=False):
        axes.errorbar(
            outcome.seconds,
            outcome.value,
            yerr=outcome.deviation,
            fmt=marker,
            color=colour,
            # Those on the Pareto front are filled.
            markerfacecolor=colour if outcome in best else "white",
            markersize=7,
            capsize=3,
            linewidth=1,
            label=outcome.method,
        )
    axes.set(xlabel="seconds in training steps", ylabel=f"{heldout} {metric.label}", title=title)
    axes.set_xlim(left=0)
    axes.grid(alpha=0.3)
    base = next((o.seconds for o in outcomes if o.method == baseline), None)
    if base is not None:
        top = axes.secondary_xaxis(
            "top", functions=(partial(np.multiply, 1 / base), partial(np.multiply, base))
        )
        top.set_xlabel(f"in units of {baseline}'s")
    figure.legend(loc="outside right upper", title="filled:\nPareto front")
    return figure
