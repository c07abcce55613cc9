"""What a report needs of a run, read from the files in its output folder; any of them may be missing."""

from __future__ import annotations

import bisect
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from torchfedrpc.experiments.baseline import BASELINE_FILE
from torchfedrpc.experiments.clients import CLIENTS_FILE
from torchfedrpc.experiments.history import HISTORY_FILE
from torchfedrpc.experiments.job import read_job, read_overrides
from torchfedrpc.experiments.trace import TRACE_FILE, read_events

MAX_ROWS = 500
"""Number of rounds, clients and losses in a report, each; more are sampled evenly."""
MAX_CALLS = 1500
"""Number of calls in a report, those of some whole rounds."""

Record = Mapping[str, Any]


@dataclass
class TracedRound:
    """Round of the trace.

    Attributes:
        begin_us: Start, in microseconds since the epoch.
        end_us: End; None if it has not ended.
        args: What the trace has of its end: sums of calls, seconds of stages, and busy seconds of workers.
        calls: Slices of its calls, with the name of their ``worker``; empty if the round is not sampled.
    """

    begin_us: int
    end_us: int | None = None
    args: Record = field(default_factory=dict)
    calls: list[Record] = field(default_factory=list)


@dataclass
class TraceData:
    """Summary of a trace.

    Attributes:
        begin_us: Time of the first event.
        starts: The instants ``run started``, one per process of the driver.
        end: The instant ``run ended``; None if there is none after the last start.
        rounds: Round number -> the last round with that number.
        instants: All other instants, with the name of their ``worker``.
    """

    begin_us: int = 0
    starts: list[Record] = field(default_factory=list)
    end: Record | None = None
    rounds: dict[int, TracedRound] = field(default_factory=dict)
    instants: list[Record] = field(default_factory=list)


@dataclass(frozen=True)
class RunData:
    """Files of a run, read.

    Attributes:
        name: Name of the output folder.
        job: ``job.json``.
        overrides: The settings of the command line, ``key=value``.
        config: ``config.yaml``.
        history: Lines of ``history.jsonl``.
        baseline: Lines of ``baseline.jsonl``.
        clients: Lines of ``clients.jsonl``.
        trace: Summary of ``trace.json``; None without the file.
        has_model: Whether there is a ``model.pt``, which a run writes at its end.
    """

    name: str
    job: Record
    overrides: Sequence[str]
    config: Record
    history: Sequence[Record]
    baseline: Sequence[Record]
    clients: Sequence[Record]
    trace: TraceData | None
    has_model: bool

    @classmethod
    def read(cls, folder: Path) -> RunData:
        """Read the files in an output folder."""
        config_file = folder / "config.yaml"
        config = yaml.safe_load(config_file.read_text(encoding="utf-8")) if config_file.exists() else None
        return cls(
            name=folder.resolve().name,
            job=read_job(folder),
            overrides=read_overrides(folder),
            config=config if isinstance(config, dict) else {},
            history=_read_lines(folder / HISTORY_FILE),
            baseline=_read_lines(folder / BASELINE_FILE),
            clients=_read_lines(folder / CLIENTS_FILE),
            trace=_read_trace(folder / TRACE_FILE),
            has_model=(folder / "model.pt").exists(),
        )


def sample(items: Sequence[Any], most: int) -> list[Any]:
    """Return ``most`` items at even distances, with the first and the last one; all of them if there are no more."""
    if len(items) <= most:
        return list(items)
    return [items[round(number * (len(items) - 1) / (most - 1))] for number in range(most)]


def _read_lines(path: Path) -> list[dict[str, Any]]:
    """Return the lines of a file, except one that a kill has cut off."""
    records = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            record = json.loads(line, parse_constant=lambda constant: None)
        except ValueError:
            continue
        if isinstance(record, dict):
            records.append(record)
    return records


def _read_trace(path: Path) -> TraceData | None:
    """Read a trace twice, since it may have more calls than memory: without its calls, then those of some rounds."""
    if not path.exists():
        return None
    trace, workers = TraceData(), {}
    num_calls: dict[int, int] = {}
    present: TracedRound | None = None
    for event in read_events(path):
        kind = event["ph"]
        if kind == "M" and event["name"] == "process_name":
            workers[event["pid"]] = event["args"]["name"]
        elif kind == "B":
            present = trace.rounds[event["args"]["round"]] = TracedRound(event["ts"])
        elif kind == "E" and present is not None:
            present.end_us, present.args, present = event["ts"], event.get("args", {}), None
        elif kind == "X" and present is not None:
            num_calls[present.begin_us] = num_calls.get(present.begin_us, 0) + 1
        elif kind == "i" and event["name"] == "run started":
            trace.starts.append(event)
            trace.end = None
        elif kind == "i" and event["name"] == "run ended":
            trace.end = event
        elif kind == "i":
            trace.instants.append({**event, "worker": workers[event["pid"]]})
    chosen = {traced.begin_us: traced for traced in _choose_rounds(trace, num_calls)}
    for event in read_events(path):
        if event["ph"] == "B":
            present = chosen.get(event["ts"])
        elif event["ph"] == "E":
            present = None
        elif event["ph"] == "X" and present is not None and len(present.calls) < MAX_CALLS:
            present.calls.append({**event, "worker": workers[event["pid"]]})
    return trace


def _choose_rounds(trace: TraceData, num_calls: Mapping[int, int]) -> list[TracedRound]:
    """Choose rounds with about `MAX_CALLS` calls together: those with a loss first, then rounds at even distances."""
    rounds = [traced for traced in trace.rounds.values() if traced.begin_us in num_calls]
    if not rounds:
        return []
    begins = [traced.begin_us for traced in rounds]
    losses = [instant["ts"] for instant in trace.instants if instant["name"] == "worker lost"]
    with_loss = [rounds[max(0, bisect.bisect(begins, ts) - 1)] for ts in losses]
    spread = sample(rounds, max(2, MAX_CALLS // max(num_calls.values())))
    chosen: list[TracedRound] = []
    total = 0
    for traced in {traced.begin_us: traced for traced in (*with_loss, *spread)}.values():
        total += num_calls[traced.begin_us]
        if total > MAX_CALLS and chosen:
            break
        chosen.append(traced)
    return chosen
