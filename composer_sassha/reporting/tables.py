"""Tables of text, as Markdown or as plain lines."""

import math
from dataclasses import dataclass

from tabulate import tabulate

NOTHING = "-"


class Best(str):
    """The text of a cell that is shown in bold."""


@dataclass
class Table:
    """Text in columns; the first is aligned to the left, and so are all if it is `prose`."""

    head: list[str]
    rows: list[list[str]]
    prose: bool = False

    def markdown(self) -> str:
        """Return the table in GitHub's Markdown."""
        rows = [[f"**{cell}**" if isinstance(cell, Best) else cell for cell in row] for row in self.rows]
        return tabulate(rows, self.head, tablefmt="github", disable_numparse=True, colalign=self._align)

    def plain(self) -> str:
        """Return the table as aligned lines.

        >>> print(Table(["method", "ms"], [["sgd", "9.5"], ["sam", "18.25"]]).plain())
        method     ms
        sgd       9.5
        sam     18.25
        """
        # The head is the first row, as tabulate pads a column under a head by two more blanks.
        return tabulate(
            [self.head, *self.rows], tablefmt="plain", disable_numparse=True, colalign=self._align
        )

    @property
    def _align(self) -> list[str]:
        return ["left", *["left" if self.prose else "right"] * (len(self.head) - 1)]


def mean_and_deviation(mean: float | None, deviation: float | None, digits: int) -> str:
    """Return the text of a cell with a mean and, if there is one, a standard deviation.

    >>> mean_and_deviation(91.0, 1.25, 2), mean_and_deviation(None, None, 2)
    ('91.00 ± 1.25', '-')
    """
    if mean is None:
        return NOTHING
    if not math.isfinite(mean):
        return "not finite"
    return f"{mean:.{digits}f}" + ("" if deviation is None else f" ± {deviation:.{digits}f}")
