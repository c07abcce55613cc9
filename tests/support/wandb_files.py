"""Records of Weights & Biases' offline files: its own messages, in the frames of LevelDB's log format."""

from __future__ import annotations

import contextlib
import json
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_HEADER_BYTES = 7  # of the file, and of each frame
_BLOCK_BYTES = 32 * 1024
_FULL, _FIRST, _MIDDLE, _LAST = 1, 2, 3, 4


def records(path: Path) -> Iterator[Any]:
    """Yield the records of a file ``run-ID.wandb``."""
    from wandb.proto import wandb_internal_pb2

    data = path.read_bytes()
    assert data[:4] == b":W&B"
    position, parts = _HEADER_BYTES, b""
    while position + _HEADER_BYTES <= len(data):
        if (left := _BLOCK_BYTES - position % _BLOCK_BYTES) < _HEADER_BYTES:
            position += left
            continue
        _, length, kind = struct.unpack_from("<IHB", data, position)
        position += _HEADER_BYTES
        parts += data[position : position + length]
        position += length
        if kind in (_FULL, _LAST):
            yield wandb_internal_pb2.Record.FromString(parts)
            parts = b""


def run_of(path: Path, timeout_s: float = 30.0) -> dict[str, Any]:
    """Return a run's ``id``, ``config``, ``history`` (by step), ``summary``, ``artifacts`` and ``exit`` code.

    A process of wandb's own writes the file, and may still do so when the run has ended.
    """
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

    deadline = time.monotonic() + timeout_s
    while True:
        with contextlib.suppress(DecodeError):
            run = _present_run(path)
            if {"id", "exit"} <= run.keys():
                return run
        assert time.monotonic() < deadline, f"{path} has no end"
        time.sleep(0.05)


def _present_run(path: Path) -> dict[str, Any]:
    run: dict[str, Any] = {"config": {}, "history": {}, "summary": {}, "artifacts": []}
    for record in records(path):
        match record.WhichOneof("record_type"):
            case "run":
                run["id"] = record.run.run_id
                run["config"] |= _values(record.run.config.update)
            case "config":
                run["config"] |= _values(record.config.update)
            case "history":
                run["history"][record.history.step.num] = _values(record.history.item)
            case "summary":
                run["summary"] |= _values(record.summary.update)
            case "artifact":
                run["artifacts"] += [entry.path for entry in record.artifact.manifest.contents]
            case "exit":
                run["exit"] = record.exit.exit_code
    return run


def _values(items: Any) -> dict[str, Any]:
    return {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items}
