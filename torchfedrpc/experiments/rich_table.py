"""Table formatted by rich."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TextIO

from rich.console import Console
from rich.table import Table


def print_rich_table(
    headers: Sequence[str], rows: Sequence[Sequence[str]], stream: TextIO, *, title: str = ""
) -> None:
    """Write a table of right-aligned cells, with the title above if it is not empty."""
    table = Table(title=title or None)
    for header in headers:
        table.add_column(header, justify="right")
    for row in rows:
        table.add_row(*row)
    needed = sum(max(map(len, column)) + 3 for column in zip(headers, *rows, strict=True)) + 1
    width = None if stream.isatty() else max(100, needed)
    Console(file=stream, width=width, markup=False, emoji=False).print(table)  # a cell may be "[a]" or ":x:"
