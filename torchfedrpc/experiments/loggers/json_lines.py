"""JSON lines: the settings, the rounds, losses of workers and the like, and the end of a run."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torchfedrpc.events import Event, ReplayEnded, WorkerJoined, WorkerLeft, WorkerLost, WorldFormed
from torchfedrpc.experiments.json_values import json_value
from torchfedrpc.experiments.loggers.base import Outcome, RunLogger, output_path
from torchfedrpc.federation.callbacks import Run
from torchfedrpc.private_files import replaced

_KINDS = {WorkerLost: "loss", WorkerJoined: "join", WorkerLeft: "leave", WorldFormed: "world", ReplayEnded: "replay"}


class JsonLinesLogger(RunLogger):
    """Writes an object per line, with its ``kind`` and ``time`` (seconds since the epoch).

    The kinds are ``settings``, ``round``, ``loss``, ``join``, ``leave``, ``world``, ``replay`` (these five with the
    fields of their events), and ``end`` (with ``status`` and ``reason``). NaN and infinity are null.

    Args:
        path: The file. Default: ``metrics.jsonl`` in the run's output folder.
    """

    def __init__(self, path: str | Path | None = None) -> None:
        super().__init__()
        self._given = path

    def open(self, run: Run, settings: Mapping[str, Any]) -> None:
        """Write the settings, after the lines of a run that resumes."""
        self._path = output_path(self, self._given, run, "metrics.jsonl")
        self._lines: list[str] = self.tracker_state.setdefault("lines", [])
        with replaced(self._path) as file:
            file.write("".join(self._lines).encode())
        self._append("settings", {"settings": settings})

    def write(self, round_num: int, metrics: Mapping[str, float]) -> None:
        """Append the line of a round."""
        self._append("round", {"round": round_num, **metrics})

    def on_event(self, run: Run, event: Event) -> None:
        """Append the line of an event of workers, on the logger's thread as all lines."""
        if (kind := _KINDS.get(type(event))) is not None:
            self.submit(lambda: self._append(kind, asdict(event)))

    def close(self, outcome: Outcome) -> None:
        """Append the last line."""
        self._append("end", {"status": outcome.status, "reason": outcome.reason})

    def _append(self, kind: str, values: Mapping[str, Any]) -> None:
        line = json.dumps(json_value({"kind": kind, "time": round(time.time(), 3), **values})) + "\n"
        with self._path.open("a", encoding="utf-8") as file:
            file.write(line)
        self._lines.append(line)
