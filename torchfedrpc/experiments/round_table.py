"""Table of the rounds, printed at the end of a run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TextIO

from torchfedrpc.experiments.history import CLIENT_HEADERS, RoundRecord
from torchfedrpc.experiments.table import print_rows

_MAX_ROWS = 10
_FURTHER_HEADERS = {"num_dropped": "dropped", **CLIENT_HEADERS, "epsilon": "epsilon"}
"""Metric that has a column where a run has it -> header."""


def print_table(records: Sequence[RoundRecord], stream: TextIO, *, title: str = "") -> None:
    """Write a table of about ten rounds, with cumulative times and traffic.

    rich formats it if it is installed. Traffic is omitted if there was none. Clients that dropped out, the last
    accuracies of an evaluation by clients, and epsilon have columns if the run has them; then headers have two lines,
    and the traffic of both directions is one column, so that the table fits 100 columns.

    Args:
        records: The history of the run; the last record is always shown.
        stream: The output stream.
        title: A line above the table.
    """
    further = [name for name in _FURTHER_HEADERS if any(name in record.more for record in records)]
    step = -(-len(records) // _MAX_ROWS) or 1
    shown = [records[: index + 1] for index in range(len(records) - 1, -1, -step)[::-1]]
    columns = {
        "rounds": [str(so_far[-1].round + 1) for so_far in shown],
        "test accuracy": [_number(so_far[-1].test_accuracy) for so_far in shown],
        "test loss": [_number(so_far[-1].test_loss) for so_far in shown],
        "train loss": [_number(so_far[-1].train_loss) for so_far in shown],
        "clients": [_number(so_far[-1].num_clients, digits=0) for so_far in shown],
        **{_FURTHER_HEADERS[name]: [_latest(so_far, name) for so_far in shown] for name in further},
        "seconds": [f"{sum(record.seconds for record in so_far):.1f}" for so_far in shown],
    }
    if any(record.bytes_sent or record.bytes_received for record in records):
        sent = [sum(record.bytes_sent for record in so_far) / 1e6 for so_far in shown]
        received = [sum(record.bytes_received for record in so_far) / 1e6 for so_far in shown]
        both = [sum(pair) for pair in zip(sent, received, strict=True)]
        traffic = {"MB": both} if further else {"MB sent": sent, "MB received": received}
        columns |= {header: [f"{value:.1f}" for value in values] for header, values in traffic.items()}
    headers = [header.replace(" ", "\n") if further else header for header in columns]
    print_rows(headers, [*zip(*columns.values(), strict=True)], stream, title=title)


def _latest(so_far: Sequence[RoundRecord], name: str) -> str:
    value = next((record.more[name] for record in reversed(so_far) if name in record.more), None)
    return _number(value, digits=0 if name == "num_dropped" else 3)


def _number(value: float | None, *, digits: int = 3) -> str:
    return "-" if value is None else f"{value:.{digits}f}"
