"""The table as text: its cells, and its lines on a terminal or in Markdown."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

from table_measure import RowResult, Spread
from table_rows import US, Line

HEADER = ("what", "torchfedrpc", "against", "theirs", "ratio", "spread", "target", "met")
_WIDTHS = (62, 11, 22, 11, 14, 18, 11, 7)
_UNITS = {"_mb": "MB", "_s": "s", "_percent": "%"}

Cells = tuple[str, ...]


def cells(result: RowResult) -> list[Cells]:
    """The lines of a row, each with a cell for each column of `HEADER`."""
    if US not in result.batches:
        return [(result.row.title, _why(result, US), "", "", "", "", "", "")]
    return [_cells(result, line) for line in result.row.lines]


def _cells(result: RowResult, line: Line) -> Cells:
    what = f"{result.row.title}: {line.what}" if line.what else result.row.title
    against, target = line.against or "", _target(line)
    own = number(result.own(line).median, line.quantity)
    if line.against is not None and line.against not in result.batches:
        return what, own, against, _why(result, line.against), "", "", target, ""
    theirs = number(result.other(line).median, line.quantity) if line.against is not None else ""
    met = {None: "", True: "yes", False: "NO"}[result.is_met(line)]
    spread = result.compared(line)
    compared = "" if line.kind == "value" else _compared(line, spread.median)
    return what, own, against, theirs, compared, _range(line, spread), target, met


def _why(result: RowResult, label: str) -> str:
    """Why somebody gives no numbers, in one line that is not too long."""
    return textwrap.shorten(str(result.unable.get(label, "no numbers")), 100)


def number(value: float, quantity: str) -> str:
    """A number with its unit."""
    if quantity != "seconds":
        unit = next(unit for suffix, unit in _UNITS.items() if quantity.endswith(suffix))
        return f"{value:.3g} {unit}" if abs(value) < 1000 else f"{value:,.0f} {unit}"
    if abs(value) < 1:
        return f"{1e3 * value:.3g} ms"
    return f"{value:.3g} s"


def _compared(line: Line, value: float) -> str:
    if line.kind in ("difference", "value"):
        return f"{'+' if line.kind == 'difference' and value > 0 else ''}{number(value, line.quantity)}"
    # Of what is no time, a ratio has no better name than itself.
    return f"{value:.2f} x {line.kind if line.quantity == 'seconds' else 'as much'}"


def _range(line: Line, spread: Spread) -> str:
    if line.kind in ("difference", "value"):
        return f"{number(spread.least, line.quantity)} .. {number(spread.most, line.quantity)}"
    return f"{spread.least:.2f} .. {spread.most:.2f}"


def _target(line: Line) -> str:
    if line.target is None:
        return ""
    if line.kind == "speed":
        return f">= {line.target:g} x"
    return f"<= {line.target:g} x" if line.kind == "time" else f"<= {number(line.target, line.quantity)}"


def on_terminal(lines: Sequence[Cells]) -> str:
    """Lines as columns of fixed width; what is too long runs over."""
    return "\n".join(
        " ".join(cell.ljust(width) for cell, width in zip(line, _WIDTHS, strict=True)).rstrip() for line in lines
    )


def in_markdown(header: Cells, lines: Sequence[Cells]) -> str:
    """Lines as a Markdown table."""
    rule = tuple("---" for _ in header)
    return "\n".join(f"| {' | '.join(cell.replace('|', '/') for cell in line)} |" for line in (header, rule, *lines))
