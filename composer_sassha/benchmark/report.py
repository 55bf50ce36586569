"""What the measurement leaves: a table, `bench.json` and a bar chart."""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from composer_sassha.recipes.files import write_atomically

# Of Okabe and Ito's palette, which every kind of eyes tells apart, and in grey too.
_BLUE, _ORANGE, _BLACK = "#0072B2", "#E69F00", "#000000"


def lines(results: Mapping[str, Any]) -> Iterator[str]:
    """The lines to print: the setting, the table, what it means, and warnings.

    Args:
        results: from `measure`.
    """
    yield f"{_setting(results)}, {results['parameters']:,} parameters, {results['threads']} threads"
    yield from table(
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
    )
    if results["device"] == "gpu":
        yield from table(
            ["method", "step", "kernels", "waits"],
            [
                [method, kind, str(count["kernels"]), str(count["waits"])]
                for method, found in results["methods"].items()
                for kind, count in found["launches"].items()
            ],
        )
    yield (
        f"Medians of {results['rounds']} rounds in which all take turns, in {results['clock']} time, over "
        "all kinds of steps; +-: half the interval that has the true median with 95 % confidence."
    )
    yield "floor: the same passes in a Trainer with nothing around them; raw: without a Trainer."
    yield (
        "MB: the most memory in a step; copies: of the parameters, beyond AdamW's; 4 microbatches: of a "
        "refresh, over that in one."
    )
    yield from warnings(results)


def warnings(results: Mapping[str, Any]) -> Iterator[str]:
    """What must not be read into the numbers.

    Args:
        results: from `measure`.
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
        *("-" if memory[key] is None else f"{1e-6 * memory[key]:.1f}" for key in ("ordinary", "refresh")),
        "-" if found["copies_beyond_adamw"] is None else f"{found['copies_beyond_adamw']:.2f}",
        "-" if memory["microbatches_over_one"] is None else f"{memory['microbatches_over_one']:.3f}",
    ]


def _number(spread: Mapping[str, Any] | None, digits: int) -> str:
    if spread is None:
        return "-"
    return f"{spread['median']:.{digits}f} +-{(spread['high'] - spread['low']) / 2:.{digits}f}"


def table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """Lines of aligned columns, the first to the left.

    Args:
        titles: of the columns.
        rows: their cells.

    >>> print(*table(["method", "ms"], [["sgd", "9.5"], ["sam", "18.25"]]), sep="\\n")
    method     ms
    sgd       9.5
    sam     18.25
    """
    widths = [max(map(len, column)) for column in zip(titles, *rows, strict=True)]
    for name, *cells in [titles, *rows]:
        yield "  ".join(
            [f"{name:<{widths[0]}}", *(f"{c:>{w}}" for c, w in zip(cells, widths[1:], strict=True))]
        )


def write(results: Mapping[str, Any], folder: Path) -> None:
    """Write `bench.json` and `bench.png`, each as a whole or not at all.

    Args:
        results: from `measure`.
        folder: made if there is none.
    """
    folder.mkdir(parents=True, exist_ok=True)
    chart = folder / "bench.png.partial"
    plot(results, chart)
    os.replace(chart, folder / "bench.png")
    write_atomically(folder / "bench.json", json.dumps(results, indent=2, allow_nan=False) + "\n")


def plot(results: Mapping[str, Any], path: Path) -> None:
    """Draw the time of a step beside its floor's, and the memory of the kinds of steps.

    Args:
        results: from `measure`.
        path: of the picture, a PNG whatever it is called.
    """
    from matplotlib.figure import Figure

    methods = results["methods"]
    figure = Figure(figsize=(11, 1.6 + 0.45 * len(methods)), layout="constrained")
    figure.suptitle(_setting(results))
    time, memory = figure.subplots(1, 2, sharey=True)
    places = range(len(methods))
    _bars(time, [found["milliseconds"] for found in methods.values()], -0.2, _BLUE, "in the Trainer")
    _bars(time, [found["floor_milliseconds"] for found in methods.values()], 0.2, _ORANGE, "its floor", "//")
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
        ("ordinary", "ordinary step", -0.2, _BLUE, None),
        ("refresh", "step that refreshes the Hessian", 0.2, _ORANGE, "//"),
    ):
        values = [(i, found["memory"][key]) for i, found in enumerate(methods.values())]
        there = [(i + shift, 1e-6 * v) for i, v in values if v is not None]
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
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=2, frameon=False)
    time.margins(x=0.15)
    figure.savefig(path, dpi=150, format="png")


def _bars(
    axes: Any,
    spreads: Sequence[Mapping[str, Any] | None],
    shift: float,
    colour: str,
    label: str,
    hatch: str | None = None,
) -> None:
    there = [(i + shift, s) for i, s in enumerate(spreads) if s is not None]
    errors = [[s["median"] - s["low"] for _, s in there], [s["high"] - s["median"] for _, s in there]]
    axes.barh(
        [y for y, _ in there],
        [s["median"] for _, s in there],
        0.38,
        xerr=errors,
        color=colour,
        hatch=hatch,
        edgecolor="white",
        ecolor=_BLACK,
        label=label,
    )
