"""Report a measurement: a table, `bench.json` and a bar chart."""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from composer_sassha.recipes.files import write_atomically
from composer_sassha.reporting.pictures import BLACK, BLUE, ORANGE, png_bytes, write_png
from composer_sassha.reporting.tables import NOTHING, Table

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def report_lines(results: Mapping[str, Any]) -> Iterator[str]:
    """Yield the lines to print: the setting, the table, what it means, and warnings.

    Args:
        results: from `measure_methods`.
    """
    yield f"{_setting(results)}, {results['parameters']:,} parameters, {results['threads']} threads"
    yield Table(
        [
            "method",
            "ms/step",
            "/ SGD",
            "/ floor",
            "floor / raw",
            "update / AdamW",
            "MB",
            "refresh MB",
            "copies",
            "4 microbatches",
        ],
        [[method, *_cells(found)] for method, found in results["methods"].items()],
    ).plain()
    if results["device"] == "gpu":
        yield Table(
            ["method", "step", "kernels", "waits"],
            [
                [method, kind, str(count["kernels"]), str(count["waits"])]
                for method, found in results["methods"].items()
                for kind, count in found["launches"].items()
            ],
        ).plain()
    yield (
        f"Medians of {results['rounds']} rounds in which all take turns, in {results['clock']} time, over "
        "all kinds of steps; +-: half the 95 % confidence interval of the median."
    )
    yield "floor: the same passes in a Trainer with nothing around them; raw: without a Trainer."
    yield (
        "MB: the most memory in a step; copies: of the parameters, beyond AdamW's; 4 microbatches: of a "
        "refresh, over that in one."
    )
    yield from warning_lines(results)


def warning_lines(results: Mapping[str, Any]) -> Iterator[str]:
    """Yield a warning for each method whose ratios are too uncertain.

    Args:
        results: from `measure_methods`.
    """
    named = {
        "over_sgd": "/ SGD",
        "over_floor": "/ floor",
        "floor_over_raw": "floor / raw",
        "update_over_adamw": "update / AdamW",
    }
    for method, found in results["methods"].items():
        vague = [title for key, title in named.items() if found[key] and found[key]["vague"]]
        if vague:
            yield (
                f"warning: {method}: {', '.join(vague)}: the rounds differ too much, or are too few, to tell "
                "differences of 3 %; take more --steps, or a quieter machine"
            )


def _setting(results: Mapping[str, Any]) -> str:
    machine = f"{results['device']} ({results['device_name']})"
    return f"{results['recipe']}, batch size {results['batch_size']}, {results['precision']}, {machine}"


def _cells(found: Mapping[str, Any]) -> list[str]:
    memory = found["memory"]
    return [
        _number(found["milliseconds"], 2),
        *(
            _number(found[key], 3)
            for key in ("over_sgd", "over_floor", "floor_over_raw", "update_over_adamw")
        ),
        *(NOTHING if memory[key] is None else f"{1e-6 * memory[key]:.1f}" for key in ("ordinary", "refresh")),
        NOTHING if found["copies_beyond_adamw"] is None else f"{found['copies_beyond_adamw']:.2f}",
        NOTHING if memory["microbatches_over_one"] is None else f"{memory['microbatches_over_one']:.3f}",
    ]


def _number(found: Mapping[str, Any] | None, digits: int) -> str:
    if found is None:
        return NOTHING
    return f"{found['median']:.{digits}f} +-{(found['high'] - found['low']) / 2:.{digits}f}"


def write_report(results: Mapping[str, Any], folder: Path) -> None:
    """Write `bench.json` and `bench.png`, each as a whole or not at all.

    Args:
        results: from `measure_methods`.
        folder: created if it is missing.
    """
    folder.mkdir(parents=True, exist_ok=True)
    write_png(png_bytes(plot_measurement(results)), folder / "bench.png")
    write_atomically(folder / "bench.json", json.dumps(results, indent=2, allow_nan=False) + "\n")


def plot_measurement(results: Mapping[str, Any]) -> "Figure":
    """Draw the time of a step next to its floor's, and the memory of the kinds of steps.

    Args:
        results: from `measure_methods`.
    """
    from matplotlib.figure import Figure

    methods = results["methods"]
    figure = Figure(figsize=(11, 1.9 + 0.45 * len(methods)), layout="constrained")
    figure.suptitle(_setting(results))
    time, memory = figure.subplots(1, 2, sharey=True)
    places = range(len(methods))
    _bars(time, [found["milliseconds"] for found in methods.values()], -0.2, BLUE, "in the Trainer")
    _bars(time, [found["floor_milliseconds"] for found in methods.values()], 0.2, ORANGE, "its floor", "//")
    for place, found in zip(places, methods.values(), strict=True):
        if found["over_floor"]:
            time.annotate(
                f" x{found['over_floor']['median']:.3f}",
                (max(found["milliseconds"]["high"], found["floor_milliseconds"]["high"]), place),
                va="center",
            )
    time.set(
        xlabel=f"ms per step ({results['clock']} time; lines: 95 % interval of the median)", title="Time"
    )
    time.set_yticks(places, methods)
    time.invert_yaxis()
    for key, label, shift, colour, hatch in (
        ("ordinary", "ordinary step", -0.2, BLUE, None),
        ("refresh", "step that refreshes the Hessian", 0.2, ORANGE, "//"),
    ):
        values = [(i, found["memory"][key]) for i, found in enumerate(methods.values())]
        there = [(i + shift, 1e-6 * v) for i, v in values if v is not None]
        if not there:
            continue
        memory.barh(
            [y for y, _ in there],
            [v for _, v in there],
            0.38,
            color=colour,
            hatch=hatch,
            edgecolor="white",
            label=label,
        )
    memory.set(xlabel="MB at most", title="Memory")
    for axes in (time, memory):
        axes.grid(axis="x", alpha=0.3)
        axes.set_axisbelow(True)
    # The layout makes room for a figure's legends, but not for those of axes.
    style: dict[str, Any] = {"ncols": 2, "frameon": False}
    figure.legend(*time.get_legend_handles_labels(), loc="outside lower left", **style)
    figure.legend(*memory.get_legend_handles_labels(), loc="outside lower right", **style)
    time.margins(x=0.15)
    return figure


def _bars(
    axes: Any,
    intervals: Sequence[Mapping[str, Any] | None],
    shift: float,
    colour: str,
    label: str,
    hatch: str | None = None,
) -> None:
    there = [(i + shift, s) for i, s in enumerate(intervals) if s is not None]
    if not there:
        return
    errors = [[s["median"] - s["low"] for _, s in there], [s["high"] - s["median"] for _, s in there]]
    axes.barh(
        [y for y, _ in there],
        [s["median"] for _, s in there],
        0.38,
        xerr=errors,
        color=colour,
        hatch=hatch,
        edgecolor="white",
        ecolor=BLACK,
        label=label,
    )
