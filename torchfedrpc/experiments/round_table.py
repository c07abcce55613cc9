"""Table of the rounds, printed at the end of a run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TextIO

from torchfedrpc.experiments.history import RoundRecord
from torchfedrpc.experiments.table import print_rows

_MAX_ROWS = 10
_HEADERS = ("rounds", "test accuracy", "test loss", "train loss", "clients", "seconds")
_TRAFFIC_HEADERS = ("MB sent", "MB received")


def print_table(records: Sequence[RoundRecord], stream: TextIO, *, title: str = "") -> None:
    """Write a table of about ten rounds, with cumulative times and traffic.

    rich formats it if it is installed. Traffic is omitted if there was none.

    Args:
        records: The history of the run; the last record is always shown.
        stream: The output stream.
        title: A line above the table.
    """
    has_traffic = any(record.bytes_sent or record.bytes_received for record in records)
    headers = _HEADERS + (_TRAFFIC_HEADERS if has_traffic else ())
    rows = [row[: len(headers)] for row in _rows(records)]
    print_rows(headers, rows, stream, title=title)


def _rows(records: Sequence[RoundRecord]) -> list[tuple[str, ...]]:
    step = -(-len(records) // _MAX_ROWS) or 1
    shown = range(len(records) - 1, -1, -step)[::-1]
    return [_row(records[: index + 1]) for index in shown]


def _row(so_far: Sequence[RoundRecord]) -> tuple[str, ...]:
    last = so_far[-1]
    return (
        str(last.round + 1),
        _number(last.test_accuracy),
        _number(last.test_loss),
        _number(last.train_loss),
        "-" if last.num_clients is None else str(last.num_clients),
        f"{sum(record.seconds for record in so_far):.1f}",
        f"{sum(record.bytes_sent for record in so_far) / 1e6:.1f}",
        f"{sum(record.bytes_received for record in so_far) / 1e6:.1f}",
    )


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
