"""The metrics that a model can have, and which of them ranks the methods."""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Metric:
    """A number that every run of a recipe ends with.

    Args:
        torchmetric: the class that computes it, torchmetrics' or Composer's, and the end of its key in
            metrics.jsonl.
        name: its key in results.json.
        best: `max` or `min`.
        percent: it is a fraction in [0, 1], shown in percent.
        digits: shown after the point.

    >>> METRICS["MulticlassAccuracy"].text(0.9972), METRICS["LanguagePerplexity"].text(5.25)
    ('accuracy 99.72%', 'perplexity 5.250')
    """

    torchmetric: str
    name: str
    best: Callable[..., Any]
    percent: bool = False
    digits: int = 4

    @property
    def scale(self) -> float:
        """Return the factor between the files and what a table or a plot shows."""
        return 100.0 if self.percent else 1.0

    @property
    def label(self) -> str:
        """Return the name with the unit, for a column or an axis."""
        return self.name + ", %" * self.percent

    def text(self, value: float) -> str:
        """Return name and value for a sentence."""
        return f"{self.name} {value:.{self.digits}{'%' if self.percent else 'f'}}"

    def logged(self, heldout: str) -> str:
        """Return the key in metrics.jsonl for the held-out part of the data."""
        return f"metrics/{heldout}/{self.torchmetric}"


# In this order the first that a model has ranks the methods; the last, a loss, decides between equals.
METRICS: Mapping[str, Metric] = {
    metric.torchmetric: metric
    for metric in (
        Metric("MulticlassAccuracy", "accuracy", max, percent=True, digits=2),
        Metric("BinaryF1Score", "f1", max, percent=True, digits=2),
        Metric("PearsonCorrCoef", "pearson", max),
        Metric("SpearmanCorrCoef", "spearman", max),
        Metric("LanguagePerplexity", "perplexity", min, digits=3),
        Metric("CrossEntropy", "loss", min),
        Metric("LanguageCrossEntropy", "loss", min),
        Metric("MeanSquaredError", "loss", min),
    )
}


def ranked(torchmetrics: Iterable[str]) -> tuple[Metric, ...]:
    """Return the metrics of these classes, the one that ranks first.

    >>> [metric.name for metric in ranked(["CrossEntropy", "MulticlassAccuracy"])]
    ['accuracy', 'loss']
    """
    there = set(torchmetrics)
    return tuple(metric for name, metric in METRICS.items() if name in there)


def metrics_of(results: Mapping[str, Any]) -> tuple[Metric, ...]:
    """Return the metrics of a finished run, from its results.json; those of early versions lack the list."""
    return ranked(results.get("metrics", ("MulticlassAccuracy", "CrossEntropy")))


def number(value: float | None) -> float:
    """Return a recorded value as a float; None stands for one that was not finite."""
    return math.nan if value is None else value
