"""The pictures of an inspection: spectra, and the loss along lines and in planes."""

import math
from collections.abc import Iterator
from itertools import cycle, product
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure

from composer_sassha.inspection.extents import EIGEN_EXTENT, EXTENT
from composer_sassha.inspection.record import Found, by_method, moments, values_of
from composer_sassha.reporting.pictures import COLOURS, LINES, png_bytes, write_png
from composer_sassha.sharpness.spectral_density import Spectrum


def draw_pictures(found: Found, folder: Path) -> None:
    """Draw the pictures into the folder, without those that there are no numbers for."""
    plots = {"spectra.png": plot_spectra, "lines.png": plot_lines, "planes.png": plot_planes}
    for name, plot in plots.items():
        if (figure := plot(found)) is not None:
            write_png(png_bytes(figure), folder / name)


def plot_spectra(found: Found) -> Figure | None:
    """Draw the spectral density of each method, in panels of one scale; None without any."""
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
        ratio, largest = (moments(values_of(runs, n))[0] for n in ("lambda_max_over_lambda_5", "lambda_max"))
        text = "" if largest is None else f"λ₁ = {largest:.3g}"
        text += "" if ratio is None else f"\nλ₁/λ₅ = {ratio:.3g}"
        axes.text(0.97, 0.95, text, transform=axes.transAxes, ha="right", va="top")
        axes.set(title=method, yscale="log")
    panels[0].set_ylim(1e-7 * highest, 3 * highest)  # one weight in millions still makes a peak
    _label_outer(panels, "eigenvalue", "density")
    panels[0].legend(loc="upper center", fontsize=8)
    return figure


def plot_lines(found: Found) -> Figure | None:
    """Draw the loss along three lines, with a curve for each method; None without any."""
    figure = Figure(figsize=(12.5, 4.2), layout="constrained")
    grid = figure.subplots(1, 3, sharey=True)
    points = np.linspace(-1.0, 1.0, found["options"]["points"])
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


def plot_planes(found: Found) -> Figure | None:
    """Draw contours of the loss, a panel for each method; None without any."""
    first = {method: runs[0] for method, runs in by_method(found).items() if runs[0]["plane"] is not None}
    if not first:
        return None
    losses = {method: np.array(run["plane"], dtype=float) for method, run in first.items()}
    everything = np.concatenate([values.ravel() for values in losses.values()])
    everything = everything[np.isfinite(everything) & (everything > 0)]
    if not len(everything):
        return None
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
    """Yield losses from below the lowest to above the highest: 1, 2 and 5 times the powers of ten."""
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
