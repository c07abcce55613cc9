"""The table as text: its cells, and its lines on a terminal or in Markdown."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

from table_measure import RowResult, Spread
from table_rows import US, Line

HEADER = (
    *("what", "torchfedrpc: median", "mean", "against", "theirs: median", "mean"),
    *("ratio of medians", "spread", "of means", "target", "met"),
)
_WIDTHS = (62, 19, 10, 22, 14, 10, 17, 18, 14, 17, 4)
_UNITS = {"_mb": "MB", "_s": "s", "_percent": "%", "_by_median": "x"}

Cells = tuple[str, ...]


def cells(result: RowResult) -> list[Cells]:
    """The lines of a row, each with a cell for each column of `HEADER`."""
    if US not in result.batches:
        return [(result.row.title, _why(result, US), *("" for _ in HEADER[2:]))]
    return [_cells(result, line) for line in result.row.lines]


def _cells(result: RowResult, line: Line) -> Cells:
    what = f"{result.row.title}: {line.what}" if line.what else result.row.title
    against, target = line.against or "", _target(line)
    own = number(result.own(line).median, line.quantity), number(result.mean(line, US), line.quantity)
    if line.against is not None and line.against not in result.batches:
        return what, *own, against, _why(result, line.against), "", "", "", "", target, ""
    theirs, compared, spread = ("", ""), ("", ""), result.compared(line)
    if line.against is not None:
        theirs = (
            number(result.other(line).median, line.quantity),
            number(result.mean(line, line.against), line.quantity),
        )
        compared = _compared(line, spread.median), _compared(line, result.compared_means(line))
    met = {None: "", True: "yes", False: "NO"}[result.is_met(line)]
    return what, *own, against, *theirs, compared[0], _range(line, spread), compared[1], target, met


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
    of_what = " of means" if line.is_of_mean else ""
    if line.kind == "speed":
        return f">= {line.target:g} x{of_what}"
    return f"<= {line.target:g} x{of_what}" if line.kind == "time" else f"<= {number(line.target, line.quantity)}"


def on_terminal(lines: Sequence[Cells]) -> str:
    """Lines as columns of fixed width; what is too long runs over."""
    return "\n".join(
        " ".join(cell.ljust(width) for cell, width in zip(line, _WIDTHS, strict=True)).rstrip() for line in lines
    )


def in_markdown(header: Cells, lines: Sequence[Cells]) -> str:
    """Lines as a Markdown table."""
    rule = tuple("---" for _ in header)
    return "\n".join(f"| {' | '.join(cell.replace('|', '/') for cell in line)} |" for line in (header, rule, *lines))
