"""Tables in Markdown."""

from __future__ import annotations

from collections.abc import Sequence


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table with aligned columns, the first to the left and the others to the right.

    >>> print(table(["depth", "layers"], [["1", "12"], ["1/2", "6"]]))
    | depth | layers |
    | ----- | -----: |
    | 1     |     12 |
    | 1/2   |      6 |
    """
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        sides = [str.ljust, *[str.rjust] * (len(cells) - 1)]
        return f"| {' | '.join(side(cell, w) for side, cell, w in zip(sides, cells, widths, strict=True))} |"

    rule = ["-" * widths[0], *("-" * (w - 1) + ":" for w in widths[1:])]
    return "\n".join([line(header), line(rule), *map(line, rows)])
