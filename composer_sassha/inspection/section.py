"""The sharpness of runs as a table and as pictures, from the sharpness.json that inspecting them writes."""

import base64
import io
import json
import math
import os
from collections.abc import Iterator
from itertools import cycle, product
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure

from composer_sassha.comparison.curves import COLOURS, LINES
from composer_sassha.comparison.table import welch
from composer_sassha.recipes.metrics import METRICS
from composer_sassha.sharpness.spectral_density import Spectrum

NOTHING = "-"
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

Found = dict[str, Any]


def by_method(found: Found) -> dict[str, list[Found]]:
    """The runs of each method, by seed."""
    methods: dict[str, list[Found]] = {}
    for run in sorted(found["runs"].values(), key=lambda run: run["seed"]):
        methods.setdefault(run["method"], []).append(run)
    order = [run["method"] for run in found["runs"].values()]
    return {method: methods[method] for method in dict.fromkeys(order)}


def _values(runs: list[Found], name: str) -> list[float]:
    found = [run["numbers"].get(name) for run in runs]
    return [value for value in found if value is not None]


def table(found: Found) -> Any:
    """Sharpness against accuracy, one row for each method."""
    from composer_sassha.comparison.report import Table, spread  # which in turn shows this section

    metric = METRICS[found["metric"]]
    head = ["method", "seeds", f"{found['heldout']} {metric.label}", *NUMBERS.values()]
    rows = []
    for method, runs in by_method(found).items():
        scores = [metric.scale * run["score"] for run in runs if run["score"] is not None]
        cells = [spread(*_moments(scores), metric.digits)]
        for name in NUMBERS:
            cells.append(_significant(*_moments(_values(runs, name))))
        rows.append([method, str(len(runs)), *cells])
    return Table(head, rows)


def _moments(values: list[float]) -> tuple[float | None, float | None]:
    mean = float(np.mean(values)) if values else None
    return mean, float(np.std(values, ddof=1)) if len(values) > 1 else None


def _significant(mean: float | None, deviation: float | None) -> str:
    """Three figures of a mean, and its deviation to the same place."""
    if mean is None:
        return NOTHING
    size = max(abs(mean), deviation or 0.0)
    digits = 2 - math.floor(math.log10(size)) if size > 0 else 0
    if not -4 <= digits <= 6:
        return f"{mean:.2e}" + ("" if deviation is None else f" ± {deviation:.0e}")
    places = max(0, digits)
    return f"{mean:.{places}f}" + ("" if deviation is None else f" ± {deviation:.{places}f}")


def notes(found: Found) -> list[str]:
    """How the largest eigenvalues compare with the baseline's."""
    methods, baseline = by_method(found), found["baseline"]
    base = [value for value in _values(methods.get(baseline, []), "lambda_max") if value > 0]
    lines = []
    for method, runs in methods.items():
        values = [value for value in _values(runs, "lambda_max") if value > 0]
        if method == baseline or not values or not base:
            continue
        ratio = math.exp(np.mean(np.log(values)) - np.mean(np.log(base)))
        p = welch(np.log(values).tolist(), np.log(base).tolist())
        tested = "" if p is None else f" (Welch's test of the logarithms: p = {p:.2g})"
        lines.append(f"λ₁ of {method}: {ratio:.2f} times {baseline}'s, geometric means{tested}.")
    return lines


def section(folder: Path) -> str:
    """The section of the report, as HTML; an empty one if nothing was inspected there."""
    try:
        found = json.loads((folder / "sharpness.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return "<!-- sharpness --><!-- /sharpness -->"
    page = Environment(loader=PackageLoader("composer_sassha", "inspection"), autoescape=True)
    options = found["options"]
    split = found["heldout"] if options["split"] == "heldout" else "training, as augmented there"
    pictures = [
        (*text, base64.b64encode((folder / name).read_bytes()).decode())
        for name, text in PICTURES.items()
        if (folder / name).exists()
    ]
    return page.get_template("section.html").render(
        samples=f"at most {options['samples']} samples of the {split} data",
        options=options,
        table=table(found),
        notes=notes(found),
        pictures=pictures,
    )


def draw(found: Found, folder: Path) -> None:
    """Draw the pictures into the folder."""
    for name, figure in zip(PICTURES, (spectra(found), lines(found), planes(found)), strict=True):
        if figure is not None:
            png = io.BytesIO()
            figure.savefig(png, format="png", dpi=150)
            partial = folder / (name + ".partial")
            partial.write_bytes(png.getvalue())
            os.replace(partial, folder / name)


def spectra(found: Found) -> Figure | None:
    """Each method's spectral density, in panels of one scale."""
    methods = {
        method: runs
        for method, runs in by_method(found).items()
        if any(run["spectrum"] is not None for run in runs)
    }
    if not methods:
        return None
    points = np.concatenate(
        [run["spectrum"][0] for runs in methods.values() for run in runs if run["spectrum"] is not None]
    )
    low, high = points.min(), points.max()
    width = (high - low) / 200 or 1.0
    at = np.linspace(low - 8 * width, high + 8 * width, 2000)
    figure, panels = _panels(len(methods), height=2.6)
    highest = 0.0
    for axes, (method, runs) in zip(panels, methods.items(), strict=True):
        for run, line, colour in zip(runs, cycle(LINES), cycle(COLOURS), strict=False):
            if run["spectrum"] is None:
                continue
            density = Spectrum(*map(np.array, run["spectrum"])).density(at, width)
            highest = max(highest, density.max())
            axes.plot(at, density, color=colour, linestyle=line, linewidth=1.0, label=f"seed {run['seed']}")
        ratio, largest = (_moments(_values(runs, n))[0] for n in ("lambda_max_over_lambda_5", "lambda_max"))
        text = "" if largest is None else f"λ₁ = {largest:.3g}"
        text += "" if ratio is None else f"\nλ₁/λ₅ = {ratio:.3g}"
        axes.text(0.97, 0.95, text, transform=axes.transAxes, ha="right", va="top")
        axes.set(title=method, yscale="log")
    panels[0].set_ylim(1e-7 * highest, 3 * highest)  # one weight in millions still makes a peak
    _label_outer(panels, "eigenvalue", "density")
    panels[0].legend(loc="upper center", fontsize=8)
    return figure


def lines(found: Found) -> Figure | None:
    """The loss along three lines, with a line for each method."""
    figure = Figure(figsize=(12.5, 4.2), layout="constrained")
    grid = figure.subplots(1, 3, sharey=True)
    points = np.linspace(-1.0, 1.0, found["options"]["points"])
    from composer_sassha.inspection.inspection import EIGEN_EXTENT, EXTENT

    places = {
        "random": (EXTENT * points, "random filter-normalized direction"),
        "eigenvector": (EIGEN_EXTENT * points, "first eigenvector"),
        "interpolation": ((1 + points) / 2, f"from each run (0) to {found['reference']} (1)"),
    }
    drawn = False
    for axes, (name, (at, label)) in zip(grid, places.items(), strict=True):
        styles = cycle(product(LINES, COLOURS))
        for (method, runs), (line, colour) in zip(by_method(found).items(), styles, strict=False):
            if name == "interpolation":  # from a run to itself there is no way
                runs = [run for run in runs if f"{run['method']}/seed{run['seed']}" != found["reference"]]
            values = runs[0]["lines"].get(name) if runs else None
            if values is not None:
                losses = np.array(values, dtype=float)
                axes.plot(at, losses, color=colour, linestyle=line, linewidth=1.4, label=method)
                drawn = True
        axes.set(xlabel=label, yscale="log")
        axes.grid(alpha=0.3)
    if not drawn:
        return None
    grid[0].set_ylabel("loss")
    handles, labels = grid[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", handlelength=3.5)
    return figure


def planes(found: Found) -> Figure | None:
    """Contours of the loss, a panel for each method."""
    first = {method: runs[0] for method, runs in by_method(found).items() if runs[0]["plane"] is not None}
    if not first:
        return None
    losses = {method: np.array(run["plane"], dtype=float) for method, run in first.items()}
    everything = np.concatenate([values.ravel() for values in losses.values()])
    everything = everything[np.isfinite(everything) & (everything > 0)]
    if not len(everything):
        return None
    from composer_sassha.inspection.inspection import EXTENT

    levels = list(_levels(everything.min(), everything.max()))
    figure, panels = _panels(len(losses), height=3.2, square=True)
    shown = None
    for axes, (method, values) in zip(panels, losses.items(), strict=True):
        at = np.linspace(-EXTENT, EXTENT, len(values))
        norm = LogNorm(levels[0], levels[-1])
        shown = axes.contourf(at, at, values, levels=levels, norm=norm, cmap="viridis", extend="both")
        marked = axes.contour(at, at, values, levels=levels, colors="white", linewidths=0.5)
        axes.clabel(marked, levels[::2], fmt="%.3g", fontsize=7)
        axes.set(title=method, aspect="equal")
    _label_outer(panels, "first direction", "second direction")
    figure.colorbar(shown, ax=panels, label="loss")  # type: ignore[arg-type]  # there is at least one panel
    return figure


def _levels(low: float, high: float) -> Iterator[float]:
    """Losses from below the lowest to above the highest, 1, 2 and 5 times the powers of ten."""
    for exponent in range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1):
        for digit in (1, 2, 5):
            level = digit * 10.0**exponent
            if low / 2.5 < level < high * 2.5:
                yield level


def _panels(count: int, height: float, square: bool = False) -> tuple[Figure, list[Axes]]:
    columns = min(count, 3)
    rows = math.ceil(count / columns)
    wide = height + 0.4 if square else 3.9
    figure = Figure(figsize=(wide * columns + 0.8, height * rows + 0.4), layout="constrained")
    grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    for axes in grid.flat[count:]:
        axes.remove()
    return figure, list(grid.flat[:count])


def _label_outer(panels: list[Axes], x: str, y: str) -> None:
    columns = min(len(panels), 3)
    for i, axes in enumerate(panels):
        if i % columns == 0:
            axes.set_ylabel(y)
        if i + columns >= len(panels):
            axes.set_xlabel(x)
            axes.tick_params(labelbottom=True)
