"""Tables of text on a stream, by rich if it is installed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TextIO

from torchfedrpc.experiments import extras


def print_rows(headers: Sequence[str], rows: Sequence[Sequence[str]], stream: TextIO, *, title: str = "") -> None:
    """Write a table of right-aligned cells.

    Args:
        headers: Names of the columns; they may have several lines.
        rows: Cells of each row.
        stream: The output stream.
        title: A line above the table.
    """
    if extras.available("rich"):
        from torchfedrpc.experiments.rich_table import print_rich_table  # noqa: PLC0415 - rich is optional

        print_rich_table(headers, rows, stream, title=title)
        return
    height = max((header.count("\n") for header in headers), default=0) + 1
    above = [([""] * height + header.split("\n"))[-height:] for header in headers]
    lines = [*zip(*above, strict=True), *rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    if title:
        print(title, file=stream)
    for row in lines:
        print("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)), file=stream)
