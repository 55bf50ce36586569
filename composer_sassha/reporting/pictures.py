"""Colours and line styles of all pictures, and pictures as PNG bytes."""

import base64
import io
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # a command that draws nothing does without matplotlib
    from matplotlib.figure import Figure

# Okabe and Ito's palette without its yellow, which is too pale for paper. The line style distinguishes lines
# of the same colour, and helps where colours are not seen or not printed.
BLUE, ORANGE, BLACK = "#0072B2", "#E69F00", "#000000"
COLOURS = [BLUE, "#D55E00", "#009E73", "#CC79A7", BLACK, "#56B4E9", ORANGE]
LINES: list[Any] = ["-", (0, (5, 1.5)), (0, (1, 1)), (0, (6, 1.5, 1, 1.5))]


def png_bytes(figure: "Figure") -> bytes:
    """Return the figure as a PNG."""
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=150)
    return file.getvalue()


def base64_text(png: bytes) -> str:
    """Return a PNG as text, for a page that contains its pictures."""
    return base64.b64encode(png).decode()


def write_png(png: bytes, path: Path) -> None:
    """Write a PNG so that the file is never there in part."""
    partial = path.with_name(path.name + ".partial")
    partial.write_bytes(png)
    os.replace(partial, path)
