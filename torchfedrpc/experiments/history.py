"""``history.jsonl``: one line of JSON per round."""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torchfedrpc.errors import ConfigError
from torchfedrpc.events import Event, RoundEnded, RoundStarted
from torchfedrpc.experiments.json_values import json_number
from torchfedrpc.experiments.sizes import size_text
from torchfedrpc.federation.callbacks import Callback, Run
from torchfedrpc.private_files import open_private, replaced
from torchfedrpc.proxy import LearnerProxy

logger = logging.getLogger(__name__)

HISTORY_FILE = "history.jsonl"

TEST_ACCURACY = "test_accuracy"

CLIENT_HEADERS = {"client_accuracy": "client accuracy", "client_accuracy_worst_decile": "worst decile"}
"""Metric of an evaluation by clients that tables have, where a run has it -> its header."""

_OWN_METRICS = (TEST_ACCURACY, "test_loss", "train_loss", "num_clients")
_NOT_METRICS = {"round", "seconds", "bytes_sent", "bytes_received", "more"}


@dataclass(frozen=True)
class RoundRecord:
    """Record of one round. The fields are the keys of a line, in order; None if the trainer did not measure it.

    Attributes:
        round: Number of the round, from 0.
        test_accuracy: Accuracy of the global model after the round on held-out samples; 0 to 1.
        test_loss: Mean loss of the global model on the same samples.
        train_loss: Mean loss of the cohort's local training.
        num_clients: Number of clients with a result in the aggregate.
        seconds: Wall-clock time since the end of the previous round, or the start of the first, scoring included.
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

    @property
    def metrics(self) -> dict[str, float]:
        """The metrics that were measured, by name."""
        ours = {name: getattr(self, name) for name in _OWN_METRICS}
        return {name: value for name, value in (ours | dict(self.more)).items() if value is not None}


@dataclass(frozen=True)
class Cost:
    """What the first rounds of a run have cost.

    Attributes:
        num_rounds: Number of rounds.
        seconds: Wall-clock time.
        simulated_seconds: Virtual time; None without a simulation.
        num_bytes: Bytes between driver and workers, in both directions.
        update_bytes: Size of the clients' updates; None without compression.
    """

    num_rounds: int
    seconds: float
    simulated_seconds: float | None
    num_bytes: int
    update_bytes: float | None = None

    @classmethod
    def of(cls, records: Sequence[RoundRecord]) -> Cost:
        """Return the cost of some rounds, from the first one."""
        updates = [size for record in records if (size := record.more.get("update_bytes")) is not None]
        return cls(
            num_rounds=len(records),
            seconds=sum(record.seconds for record in records),
            simulated_seconds=records[-1].more.get("simulated_seconds") if records else None,
            num_bytes=sum(record.bytes_sent + record.bytes_received for record in records),
            update_bytes=sum(updates) if updates else None,
        )

    def __str__(self) -> str:
        parts = ["1 round" if self.num_rounds == 1 else f"{self.num_rounds} rounds", f"{self.seconds:.1f} s"]
        if self.simulated_seconds is not None:
            parts.append(f"{self.simulated_seconds:.1f} simulated s")
        if self.num_bytes:  # local mode has no traffic
            parts.append(f"{size_text(self.num_bytes)} of traffic")
        if self.update_bytes is not None:
            parts.append(f"{size_text(self.update_bytes)} of updates")
        return ", ".join(parts)


class RoundMeter:
    """Meter of a run's time and traffic: from the start of the first round to its end, then from end to end.

    Args:
        proxy: The run's proxy, which counts the bytes sent and received.
    """

    def __init__(self, proxy: LearnerProxy) -> None:
        self._proxy = proxy
        self._begin()
        self._unsubscribe = proxy.subscribe(self._on_event)

    def _begin(self) -> None:
        self._time, self._traffic = time.perf_counter(), self._proxy.stats()

    def _on_event(self, event: Event) -> None:
        if isinstance(event, RoundStarted):
            self._unsubscribe()
            self._begin()

    def take(self) -> dict[str, Any]:
        """Return ``seconds``, ``bytes_sent`` and ``bytes_received`` since the last time."""
        now, traffic = time.perf_counter(), self._proxy.stats()
        taken: dict[str, Any] = {"seconds": round(now - self._time, 6)} | {
            name: traffic[name] - self._traffic[name] for name in ("bytes_sent", "bytes_received")
        }
        self._time, self._traffic = now, traffic
        return taken


class History(Callback):
    """Log of the rounds of a run, in memory and in a file to which each round is appended at its end.

    Args:
        path: The file. A run from its first round replaces its content, and so does `load_state_dict`.

    Attributes:
        records: The rounds so far.
    """

    def __init__(self, path: Path) -> None:
        self.records: list[RoundRecord] = []
        self._path = path
        self._meter: RoundMeter | None = None
        self._not_finite: set[str] = set()

    def on_run_start(self, run: Run) -> None:
        """Begin a new file, unless the run resumes."""
        self._meter = RoundMeter(run.proxy)
        if run.first_round == 0:
            self._write()

    def on_round_end(self, run: Run, ended: RoundEnded) -> None:
        """Record a round.

        Raises:
            ConfigError: If a metric is not a number, or has the name of a key of a line that is none of a metric.
        """
        assert self._meter is not None
        metrics = {str(name): _number(name, value) for name, value in ended.metrics.items()}
        for name in [name for name, value in metrics.items() if value is None and name not in self._not_finite]:
            self._not_finite.add(name)
            where = name, ended.metrics[name], ended.round_num + 1
            logger.warning("%s is %s after round %d: the training may have diverged", *where)
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
        self._write()

    def _write(self) -> None:
        with replaced(self._path) as file:
            file.write("".join(map(_line, self.records)).encode())


def _line(record: RoundRecord) -> str:
    values = asdict(record)
    more = values.pop("more")
    return json.dumps(values | more) + "\n"


def _number(name: str, value: Any) -> float | None:
    """Return a metric as a number; None for NaN and infinity: a diverged loss is null in the file."""
    if name in _NOT_METRICS:
        raise ConfigError(f"history.jsonl has a key {name!r} of its own: rename the trainer's metric {name!r}")
    try:
        return json_number(value)
    except TypeError:
        raise ConfigError(f"the metric {name!r} of a round must be a number, not {value!r:.100}") from None
