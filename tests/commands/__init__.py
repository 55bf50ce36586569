"""The commands as functions: each takes its arguments and returns the exit status."""

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure
from PIL import Image

from composer_sassha.commands import main

SMALL = ["model.width=2", "data.batch_size=256", "progress_bar=false"]  # 5 steps an epoch


def train(arguments: Sequence[str]) -> int:
    return main(["train", *arguments])


def compare(arguments: Sequence[str]) -> int:
    return main(["compare", *arguments])


def inspect(arguments: Sequence[str]) -> int:
    return main(["inspect", *arguments])


def bench(arguments: Sequence[str]) -> int:
    return main(["bench", *arguments])


def undraw(patch: pytest.MonkeyPatch) -> None:
    """Save every figure as one pixel: drawing takes most of the time of a short run or a report."""
    pixel = io.BytesIO()
    Image.new("1", (1, 1)).save(pixel, "png")

    def save(figure: Figure, file: Any, **settings: Any) -> None:
        write = file.write if isinstance(file, io.BytesIO) else Path(file).write_bytes
        write(pixel.getvalue())

    patch.setattr(Figure, "savefig", save)


def refused(argv: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """Run `train`, and return the one line with which it refuses."""
    assert train(argv) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.endswith("\n") and err.count("\n") == 1
    return err


def records(run: Path) -> list[dict[str, Any]]:
    """Read the metrics.jsonl of a run."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
