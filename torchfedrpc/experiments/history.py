"""``history.jsonl``: one line of JSON per round."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torchfedrpc.events import RoundEnded
from torchfedrpc.private_files import open_private, replaced
from torchfedrpc.proxy import LearnerProxy

HISTORY_FILE = "history.jsonl"


@dataclass(frozen=True)
class RoundRecord:
    """Record of one round. The fields are the keys of a line, in order; None if the trainer did not measure it.

    Attributes:
        round: Number of the round, from 0.
        test_accuracy: Accuracy of the global model after the round on held-out samples; 0 to 1.
        test_loss: Mean loss of the global model on the same samples.
        train_loss: Mean loss of the cohort's local training.
        num_clients: Number of clients with a result in the aggregate.
        seconds: Wall-clock time since the end of the previous round, scoring included, in seconds.
        bytes_sent: Bytes from the driver to workers in that time.
        bytes_received: Bytes from workers to the driver in that time.
        more: The other metrics of the trainer by name. Each is a key of the line, after the keys above.
    """

    round: int
    test_accuracy: float | None
    test_loss: float | None
    train_loss: float | None
    num_clients: int | None
    seconds: float
    bytes_sent: int
    bytes_received: int
    more: Mapping[str, float | None] = field(default_factory=dict)


class RoundMeter:
    """Meter of a run's time and traffic, from one round's end to the next.

    Args:
        proxy: The run's proxy, which counts the bytes sent and received.
    """

    def __init__(self, proxy: LearnerProxy) -> None:
        self._proxy = proxy
        self._time, self._traffic = time.perf_counter(), proxy.stats()

    def take(self) -> dict[str, Any]:
        """Return ``seconds``, ``bytes_sent`` and ``bytes_received`` since the last time."""
        now, traffic = time.perf_counter(), self._proxy.stats()
        taken: dict[str, Any] = {"seconds": round(now - self._time, 6)} | {
            name: traffic[name] - self._traffic[name] for name in ("bytes_sent", "bytes_received")
        }
        self._time, self._traffic = now, traffic
        return taken


class History:
    """Log of the rounds of a run, in memory and in a file to which each round is appended at its end.

    Args:
        path: The file. Its content is replaced at once, or by `load_state_dict`.
        proxy: The run's proxy, which counts the bytes sent and received.
        goes_on: Whether `load_state_dict` follows; the file is left unchanged until then.

    Attributes:
        records: The rounds so far.
    """

    def __init__(self, path: Path, proxy: LearnerProxy, *, goes_on: bool = False) -> None:
        self.records: list[RoundRecord] = []
        self._path = path
        self._proxy = proxy
        self._meter = RoundMeter(proxy)
        if not goes_on:
            with replaced(path):
                pass

    def append(self, ended: RoundEnded) -> None:
        """Record a round at its end."""
        metrics = {name: _finite(value) for name, value in ended.metrics.items()}
        num_clients = metrics.get("num_clients")
        record = RoundRecord(
            round=ended.round_num,
            test_accuracy=metrics.get("test_accuracy"),
            test_loss=metrics.get("test_loss"),
            train_loss=metrics.get("train_loss"),
            num_clients=None if num_clients is None else int(num_clients),
            more={name: value for name, value in metrics.items() if name not in RoundRecord.__annotations__},
            **self._meter.take(),
        )
        self.records.append(record)
        descriptor = open_private(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        with os.fdopen(descriptor, "a", encoding="utf-8") as file:
            file.write(_line(record))

    def state_dict(self) -> dict[str, Any]:
        """Return the rounds so far, as plain data."""
        return {"records": [asdict(record) for record in self.records]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the rounds of a state, and replace the whole file by them."""
        self.records[:] = [RoundRecord(**record) for record in state["records"]]
        with replaced(self._path) as file:
            file.write("".join(map(_line, self.records)).encode())
        self._meter = RoundMeter(self._proxy)


def _line(record: RoundRecord) -> str:
    values = asdict(record)
    more = values.pop("more")
    return json.dumps(values | more) + "\n"


def _finite(value: float) -> float | None:
    """Return None for NaN and infinity, which JSON lacks: a diverged loss is written as null."""
    return value if math.isfinite(value) else None
