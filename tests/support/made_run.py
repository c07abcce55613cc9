"""Output folders of runs that never ran, of any size: the files that a report reads, and a trace by `Trace`."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, cast

import pytest

from torchfedrpc.events import (
    CallEnded,
    CallTimes,
    Event,
    ReplayEnded,
    RoundEnded,
    RoundStarted,
    RunEnded,
    RunStarted,
    WorkerJoined,
    WorkerLost,
    WorldFormed,
)
from torchfedrpc.experiments import trace as trace_module
from torchfedrpc.experiments.trace import TRACE_FILE, Trace
from torchfedrpc.federation.callbacks import Run

CONFIG = """\
seed: 0
runtime: {execution_mode: pseudo, num_clients: %d, num_processes: %d}
dataset: {_target_: torchfedrpc.experiments.data.digits.digits, test_fraction: 0.2}
partition: {_target_: torchfedrpc.experiments.data.partition.dirichlet, alpha: 0.5}
model: {_target_: torchfedrpc.experiments.models.ConvNet}
trainer: {_target_: torchfedrpc.federation.algorithms.fedavg.FedAvgTrainer, num_rounds: %d}
"""


class FakeRun:
    """What a trace sees of a run."""

    output_dir: Path | None = None

    def __init__(self, num_workers: int) -> None:
        stats = {
            "machine": "node-1",
            "bytes_sent": 12_000_000,
            "bytes_received": 34_000_000,
            "memory_bytes": 400_000_000,
        }
        self.workers = {f"worker{number}": stats for number in range(1, num_workers + 1)}
        self.proxy = self

    def stats(self) -> dict[str, Any]:
        return {"workers": self.workers}


class Clock:
    """A clock that a test sets by hand."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def perf_counter(self) -> float:
        return self.now_s

    def time(self) -> float:
        return 1_700_000_000.0 + self.now_s


class TracedRun:
    """A trace whose time a test sets by hand."""

    def __init__(
        self,
        path: Path,
        monkeypatch: pytest.MonkeyPatch,
        *,
        num_workers: int = 2,
        resumes: Mapping[str, Any] | None = None,
        **settings: Any,
    ) -> None:
        self.clock = Clock()
        monkeypatch.setattr(trace_module, "time", self.clock)
        self.run = cast(Run, FakeRun(num_workers))
        self.trace = Trace(path, **settings)
        if resumes is not None:
            self.trace.load_state_dict(resumes)
        self.trace.on_run_start(self.run)

    def at(self, now_s: float, event: Event) -> None:
        self.clock.now_s = now_s
        self.trace.on_event(self.run, event)

    def kill(self) -> None:
        """Leave the trace as a killed driver does."""
        assert self.trace._file is not None
        self.trace._file.close()

    def end(self) -> None:
        self.trace.on_run_end(self.run, None)


def make_run(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    *,
    num_rounds: int = 20,
    client_ids: Iterable[str] = (),
    num_clients: int = 10,
    num_workers: int = 2,
    num_classes: int = 10,
    lost_in: int | None = 7,
    ended: bool = True,
    metrics: Mapping[str, float] | None = None,
) -> Path:
    """Write the output folder of a run."""
    draw = random.Random(0)
    ids = list(client_ids) or [f"client_{number}" for number in range(1, num_clients + 1)]
    workers = [f"worker{number}" for number in range(1, num_workers + 1)]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(CONFIG % (len(ids), num_workers, num_rounds))
    made = TracedRun(folder / TRACE_FILE, monkeypatch, num_workers=num_workers, max_calls=None)
    made.at(0.0, RunStarted("pseudo", len(ids)))
    now_s, call_id, history = 0.0, 0, []
    for number in range(num_rounds):
        made.at(now_s, RoundStarted(number, num_rounds))
        free = dict.fromkeys(workers, now_s)
        calls = []
        for client_id in ids:
            worker = min(free, key=free.__getitem__)
            times = CallTimes(free[worker] - now_s, 0.0004, draw.uniform(0.01, 0.05), 0.0006)
            call_id, free[worker] = call_id + 1, free[worker] + 0.001 + times.run_s
            error = ValueError("diverged") if draw.random() < 0.01 else None
            seconds = free[worker] - now_s
            calls.append((free[worker], CallEnded(call_id, client_id, "train_epoch", seconds, error, worker, times)))
        for end_s, event in sorted(calls, key=lambda call: call[0]):
            made.at(end_s, event)
        now_s = max(free.values())
        if number == lost_in:
            made.at(now_s, WorkerLost(workers[-1], "its process ended with signal 9"))
            made.at(now_s + 0.2, WorldFormed(2, 0.05))
            made.at(now_s + 0.4, WorkerJoined(workers[-1]))
            made.at(now_s + 0.5, ReplayEnded(ids[0], workers[-1], 3, 0.08))
            now_s += 0.6
        quality = 1 - 0.9 / (1 + 0.3 * number)
        values = {"test_accuracy": quality, "test_loss": 2.3 * (1 - quality), "train_loss": 2 * (1 - quality) ** 2}
        values = {**values, "num_clients": len(ids)} if metrics is None else dict(metrics)
        made.at(now_s, RoundEnded(number, num_rounds, values))
        traffic = {"seconds": 0.5 + draw.random() / 5, "bytes_sent": 900_000, "bytes_received": 2_000_000}
        history.append({"round": number, **values, **traffic})
    if ended:
        made.at(now_s, RunEnded(None))
        made.end()
        (folder / "model.pt").touch()
    else:
        made.kill()
    _write(folder / "history.jsonl", history)
    scores = ({"accuracy": 0.95 - 0.3 * draw.random() ** 3, "loss": draw.random()} for _ in ids)
    shares = [{str(label): int(draw.paretovariate(0.9)) % 90 for label in range(num_classes)} for _ in ids]
    clients = [
        {"client": client_id, "num_samples": sum(share.values()), "classes": share}
        | ({"scores": score} if ended else {})
        for client_id, share, score in zip(ids, shares, scores, strict=False)
    ]
    _write(folder / "clients.jsonl", clients)
    if ended and metrics is None:
        central = [{"round": number, "test_accuracy": 1 - 0.5 / (1 + number)} for number in range(num_rounds)]
        _write(folder / "baseline.jsonl", central)
    return folder


def _write(path: Path, records: Iterable[Mapping[str, Any]]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
