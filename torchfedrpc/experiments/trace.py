"""``trace.json``: calls, rounds, losses and checkpoints of a run in Chrome's trace event format, for Perfetto."""

from __future__ import annotations

import json
import math
import os
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any, ClassVar

from torchfedrpc.errors import ConfigError
from torchfedrpc.events import (
    CallEnded,
    CheckpointSaved,
    Event,
    ReplayEnded,
    ReplayStarted,
    RoundEnded,
    RoundStarted,
    RunEnded,
    RunStarted,
    WorkerJoined,
    WorkerLeft,
    WorkerLost,
    WorldFormed,
)
from torchfedrpc.experiments.json_values import json_value
from torchfedrpc.federation.callbacks import Callback, Run
from torchfedrpc.private_files import open_private, replaced

TRACE_FILE = "trace.json"
STAGES = ("queue", "transfer", "run", "return")

_DRIVER = "driver"
_FLUSH_BYTES = 1 << 16
_encode = json.JSONEncoder(separators=(",", ":")).encode
_MAX_CLOCK_ERROR_US = 1000  # by which slices of calls that ran one after the other may overlap
_INSTANTS: Mapping[type[Event], str] = {
    RunStarted: "run started",
    RunEnded: "run ended",
    WorkerLost: "worker lost",
    WorkerJoined: "worker joined",
    WorkerLeft: "worker left",
    ReplayStarted: "replay started",
    ReplayEnded: "replay ended",
    WorldFormed: "world formed",
    CheckpointSaved: "checkpoint saved",
}


class Trace(Callback):
    """Callback that writes a trace of the run, as a stream: its memory does not grow with the run.

    Each worker is a process of the trace. A slice of its track ``running`` is a call; calls that run at once have
    tracks beside it. The stages ``queue``, ``transfer`` and ``return`` of several calls overlap, so they are
    asynchronous slices. The process ``driver`` has a track of rounds. Losses, joins, replays, worlds and checkpoints
    are instants. The end of a round has the sums of all its calls, also of those beyond ``max_calls``.

    The file is a JSON array with one event per line, and times in microseconds since the epoch. Without the closing
    bracket, as after a kill, it is still valid in this format.

    Args:
        path: The file. It is replaced, or continued by a run that resumes. Default: ``trace.json`` in the run's
            output folder.
        max_calls: Number of calls in the trace, the first ones of a run. None: All calls.

    Raises:
        ConfigError: If ``max_calls`` is no whole number of at least 0; at the start of the run, if there is no path.
    """

    may_fail: ClassVar[bool] = True

    def __init__(self, path: str | Path | None = None, *, max_calls: int | None = 10_000) -> None:
        if max_calls is not None and (type(max_calls) is not int or max_calls < 0):
            raise ConfigError(
                f"max_calls (trace_calls) must be a whole number of at least 0, or null, not {max_calls!r}"
            )
        self._path = None if path is None else Path(path).absolute()
        self._earlier: Path | None = None
        self._max_calls = math.inf if max_calls is None else max_calls
        self._num_traced = 0
        self._file: IO[bytes] | None = None
        self._lines: list[str] = []
        self._num_bytes = 0
        self._processes: dict[str, int] = {}
        self._tracks: dict[int, list[int]] = defaultdict(list)  # process -> end of the last slice of each track
        self._epoch_us = time.time() * 1e6 - time.perf_counter() * 1e6
        self._reset_sums()

    def on_run_start(self, run: Run) -> None:
        """Create the file, in a run that resumes with the events of the earlier one."""
        if self._path is None:
            if run.output_dir is None:
                raise ConfigError("Trace has no folder: give it a path, or set trainer.output_dir")
            self._path = run.output_dir.absolute() / TRACE_FILE
        earlier = self._path if self._earlier is not None and self._path.exists() else self._earlier
        self._separator = "\n"
        with replaced(self._path) as file:
            file.write(b"[")
            if earlier is not None:
                self._copy(earlier, file)
        self._file = os.fdopen(open_private(self._path, os.O_WRONLY | os.O_APPEND), "ab", buffering=0)
        self._process(_DRIVER)
        self._flush()

    def _copy(self, earlier: Path, file: IO[bytes]) -> None:
        """Copy a trace, and end the round in which it was cut off."""
        num_open, last_us = 0, 0
        for line in read_lines(earlier):
            file.write(self._separator.encode() + line)
            self._separator = ",\n"
            event = json.loads(line)
            num_open += (event["ph"] == "B") - (event["ph"] == "E")
            last_us = event.get("ts", last_us)
            if event["ph"] == "M" and event["name"] == "process_name":
                self._processes[event["args"]["name"]] = event["pid"]
        if num_open > 0:
            self._write(ph="E", pid=self._process(_DRIVER), tid=0, ts=last_us)

    def on_event(self, run: Run, event: Event) -> None:
        """Write an event."""
        if isinstance(event, CallEnded):
            self._call_ended(event)
        elif isinstance(event, RoundStarted):
            self._write(
                ph="B",
                name=f"round {event.round_num + 1}",
                cat="round",
                **self._here(),
                args={"round": event.round_num},
            )
        elif isinstance(event, RoundEnded):
            args = {"round": event.round_num, "metrics": event.metrics, **self._sums()}
            self._write(ph="E", **self._here(), args=args)
            self._flush()
        elif (name := _INSTANTS.get(type(event))) is not None:
            args = dict(vars(event))
            if isinstance(event, RunEnded):
                args |= self._sums() | {"workers": run.proxy.stats().get("workers", {})}
            worker = getattr(event, "worker", _DRIVER)
            self._write(ph="i", s="p", name=name, cat="run", **self._here(worker), args=args)
        if self._num_bytes > _FLUSH_BYTES:
            self._flush()

    def on_run_end(self, run: Run, error: BaseException | None) -> None:
        """Close the array and the file."""
        self._lines.append("\n]\n")
        self._flush()
        if self._file is not None:
            self._file.close()

    def state_dict(self) -> dict[str, Any]:
        """Return where the trace is, which a run that resumes continues, and the number of calls in it."""
        return {"path": str(self._path), "num_traced": self._num_traced}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue the trace of an earlier run: the one at the path of this trace, or else the one in the state."""
        self._earlier, self._num_traced = Path(state["path"]), state["num_traced"]

    def _call_ended(self, event: CallEnded) -> None:
        end = self._now_us()
        seconds = event.times
        self._num_calls += 1
        self._num_failed += event.error is not None
        if seconds is not None:
            for stage in STAGES:
                self._stages[stage] += getattr(seconds, f"{stage}_s")
            self._busy_s[event.worker] += seconds.run_s
        if self._num_traced >= self._max_calls:
            return
        self._num_traced += 1
        begin = end - round(event.seconds * 1e6)
        queued = sent = begin
        ran = end
        if seconds is not None:
            queued = begin + round(seconds.queue_s * 1e6)
            sent = queued + round(seconds.transfer_s * 1e6)
            ran = max(sent, end - round(seconds.return_s * 1e6))
        process = self._process(event.worker or _DRIVER)
        stages = {"queue": (begin, queued), "transfer": (queued, sent), "return": (ran, end)}
        args: dict[str, Any] = {"client": event.client_id, "method": event.method, "call": event.call_id}
        encoded = _encode(args)
        for stage, (first, last) in stages.items():
            if last > first:
                place = f'"name":"{stage}","cat":"{stage}","id":{event.call_id},"pid":{process},"tid":0'
                self._add(f'{{"ph":"b",{place},"ts":{first},"args":{encoded}}}')
                self._add(f'{{"ph":"e",{place},"ts":{last}}}')
        if event.error is not None:
            args["error"] = type(event.error).__name__
        if event.worker:
            args |= {f"{stage}_us": last - first for stage, (first, last) in stages.items()}
            track = self._track(process, sent, ran)
            self._add(_encode({"ph": "X", "name": event.method, "cat": "run", **track, "args": args}))

    def _track(self, process: int, begin: int, end: int) -> dict[str, int]:
        """Return the place of a slice in the first track of a process where it overlaps no other."""
        tracks = self._tracks[process]
        earliest = begin + min(_MAX_CLOCK_ERROR_US, (end - begin) // 5)
        track = next((number for number, last in enumerate(tracks) if last <= earliest), len(tracks))
        if track == len(tracks):
            tracks.append(0)
            name = "running" if track == 0 else f"running {track + 1}"
            self._write(ph="M", name="thread_name", pid=process, tid=track + 1, args={"name": name})
        begin = max(begin, tracks[track])
        tracks[track] = end
        return {"pid": process, "tid": track + 1, "ts": begin, "dur": end - begin}

    def _here(self, worker: str = _DRIVER) -> dict[str, int]:
        return {"pid": self._process(worker), "tid": 0, "ts": self._now_us()}

    def _process(self, worker: str) -> int:
        if worker not in self._processes:
            process = self._processes[worker] = len(self._processes) + 1
            self._write(ph="M", name="process_name", pid=process, tid=0, args={"name": worker})
            self._write(ph="M", name="process_sort_index", pid=process, tid=0, args={"sort_index": process})
            name = "rounds" if worker == _DRIVER else "events"
            self._write(ph="M", name="thread_name", pid=process, tid=0, args={"name": name})
        return self._processes[worker]

    def _now_us(self) -> int:
        return round(self._epoch_us + time.perf_counter() * 1e6)

    def _sums(self) -> dict[str, Any]:
        """Return the sums of the calls since the last sums."""
        sums = {
            "calls": self._num_calls,
            "failed": self._num_failed,
            "stages": {stage: round(seconds, 6) for stage, seconds in self._stages.items()},
            "busy_s": {worker: round(seconds, 6) for worker, seconds in self._busy_s.items()},
        }
        self._reset_sums()
        return sums

    def _reset_sums(self) -> None:
        self._num_calls = self._num_failed = 0
        self._stages = dict.fromkeys(STAGES, 0.0)
        self._busy_s: dict[str, float] = defaultdict(float)

    def _write(self, **event: Any) -> None:
        self._add(_encode(json_value(event)))

    def _add(self, line: str) -> None:
        self._lines.append(self._separator + line)
        self._separator = ",\n"
        self._num_bytes += len(line)

    def _flush(self) -> None:
        lines, self._lines, self._num_bytes = self._lines, [], 0
        if self._file is not None:
            self._file.write("".join(lines).encode())


def read_lines(path: Path) -> Iterator[bytes]:
    """Yield the events of a trace, each as a line of JSON, without one that a kill has cut off."""
    if not path.exists():
        return
    with path.open("rb") as file:
        for line in file:
            event = line.strip().removesuffix(b",")
            if event.startswith(b"{") and (line.endswith(b",\n") or _is_json(event)):  # a kill cuts the last line off
                yield event


def read_events(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the events of a trace without those of the stages, which the slices of calls have in their ``args``."""
    for line in read_lines(path):
        if not line.startswith((b'{"ph":"b"', b'{"ph":"e"')):
            yield json.loads(line)


def _is_json(line: bytes) -> bool:
    try:
        json.loads(line)
    except ValueError:
        return False
    return True
