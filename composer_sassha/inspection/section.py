"""The section on sharpness in the report of a comparison."""

import json
import math
from pathlib import Path

import numpy as np
from jinja2 import Environment, PackageLoader

from composer_sassha.inspection.record import Found, by_method, moments, values_of
from composer_sassha.recipes.files import write_atomically
from composer_sassha.recipes.metrics import METRICS
from composer_sassha.reporting.pictures import base64_text
from composer_sassha.reporting.significance import welch
from composer_sassha.reporting.tables import NOTHING, Table, mean_and_deviation

# Columns of the table: the number, and the head.
NUMBERS = {
    "lambda_max": "λ₁",
    "lambda_max_over_lambda_5": "λ₁/λ₅",
    "trace": "trace",
    "sam": "SAM",
    "gap_eigenvalue": "2h/ρ²",
    "m64": "m = 64",
    "m16": "m = 16",
    "asam": "ASAM",
    "average": "average",
    "full_grad_norm": "‖g‖",
    "loss": "loss",
}
PICTURES = {
    "spectra.png": (
        "Spectra",
        "Density of the Hessian's eigenvalues by stochastic Lanczos quadrature, every point smoothed to a "
        "Gaussian; one line for each seed, and all panels on one scale. The numbers are means over "
        "them.",
    ),
    "lines.png": (
        "Landscapes along lines",
        "The loss along a random direction whose filters are as long as those of the weights, along the "
        "eigenvector of the largest eigenvalue (in units of its length), and on the straight line to another "
        "run, BatchNorm's statistics included; the first seed of each method.",
    ),
    "planes.png": (
        "Landscapes in a plane",
        "The loss in the plane of two random, filter-normalized directions, the same for all methods; the "
        "first seed of each. One scale of colours, and contours at the same losses.",
    ),
}


def sharpness_table(found: Found) -> Table:
    """Return sharpness against accuracy, one row for each method."""
    metric = METRICS[found["metric"]]
    head = ["method", "seeds", f"{found['heldout']} {metric.label}", *NUMBERS.values()]
    rows = []
    for method, runs in by_method(found).items():
        scores = [metric.scale * run["score"] for run in runs if run["score"] is not None]
        cells = [mean_and_deviation(*moments(scores), metric.digits)]
        for name in NUMBERS:
            cells.append(_significant(*moments(values_of(runs, name))))
        rows.append([method, str(len(runs)), *cells])
    return Table(head, rows)


def _significant(mean: float | None, deviation: float | None) -> str:
    """Return three figures of a mean, and its deviation to the same place."""
    if mean is None:
        return NOTHING
    size = max(abs(mean), deviation or 0.0)
    digits = 2 - math.floor(math.log10(size)) if size > 0 else 0
    if not -4 <= digits <= 6:
        return f"{mean:.2e}" + ("" if deviation is None else f" ± {deviation:.0e}")
    places = max(0, digits)
    return f"{mean:.{places}f}" + ("" if deviation is None else f" ± {deviation:.{places}f}")


def eigenvalue_notes(found: Found) -> list[str]:
    """Compare the largest eigenvalues of each method with the baseline's."""
    methods, baseline = by_method(found), found["baseline"]
    base = [value for value in values_of(methods.get(baseline, []), "lambda_max") if value > 0]
    lines = []
    for method, runs in methods.items():
        values = [value for value in values_of(runs, "lambda_max") if value > 0]
        if method == baseline or not values or not base:
            continue
        ratio = math.exp(np.mean(np.log(values)) - np.mean(np.log(base)))
        p = welch(np.log(values).tolist(), np.log(base).tolist())
        tested = "" if p is None else f" (Welch's test of the logarithms: p = {p:.2g})"
        lines.append(f"λ₁ of {method}: {ratio:.2f} times {baseline}'s, geometric means{tested}.")
    return lines


def sharpness_section(folder: Path) -> str:
    """Return the section of the report as HTML; an empty one if nothing was inspected there."""
    try:
        found = json.loads((folder / "sharpness.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return "<!-- sharpness --><!-- /sharpness -->"
    page = Environment(loader=PackageLoader("composer_sassha", "inspection"), autoescape=True)
    options = found["options"]
    split = found["heldout"] if options["split"] == "heldout" else "training, as augmented there"
    pictures = [
        (*text, base64_text((folder / name).read_bytes()))
        for name, text in PICTURES.items()
        if (folder / name).exists()
    ]
    return page.get_template("section.html").render(
        samples=f"at most {options['samples']} samples of the {split} data",
        options=options,
        table=sharpness_table(found),
        notes=eigenvalue_notes(found),
        pictures=pictures,
    )


def put_section(page: Path, section: str) -> None:
    """Put the section into a report that is there.

    Args:
        page: the report.html.
        section: from `sharpness_section`.
    """
    write_atomically(page, with_section(page.read_text(encoding="utf-8"), section))


def with_section(report: str, section: str) -> str:
    """Return the page with the section in place of an earlier one, or else at the end.

    Args:
        report: the page.
        section: from `sharpness_section`, with its markers.

    >>> with_section("<p>1</p></body>", "<!-- sharpness -->new<!-- /sharpness -->")
    '<p>1</p><!-- sharpness -->new<!-- /sharpness --></body>'
    >>> with_section("<p>1</p><!-- sharpness -->old<!-- /sharpness --></body>", "<!-- sharpness -->...")
    '<p>1</p><!-- sharpness -->...</body>'
    """
    begin, end = "<!-- sharpness -->", "<!-- /sharpness -->"
    before, marker, rest = report.partition(begin)
    if not marker:
        before, _, rest = report.rpartition("</body>")
        return f"{before}{section}</body>{rest}"
    return before + section + rest.partition(end)[2]
