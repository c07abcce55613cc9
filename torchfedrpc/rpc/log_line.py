"""A record that a worker logs, as a line on its heartbeat connection."""

from __future__ import annotations

import json
import math
import select

from torchfedrpc.events import WorkerLogged
from torchfedrpc.rpc.heartbeat_process import LOGGED

LINE_BYTES = getattr(select, "PIPE_BUF", 512)  # Windows has none, and no workers
"""Largest line: a pipe takes it at once or not at all, beside those of other threads and of forked children."""

Head = tuple[int, str, str | None, float]
"""Level, name of the logger, client and time of a record."""


def line_of(head: Head, message: str) -> tuple[bytes, str]:
    """Return the line of a record, and the part of its message that did not fit; cut between lines if possible."""
    frame_bytes = len(LOGGED) + len(json.dumps([*head, ""])) + 1
    if frame_bytes > LINE_BYTES // 2 and head[2] is not None:  # a client id of that size
        return line_of((head[0], head[1], None, head[3]), message)
    room = LINE_BYTES - frame_bytes
    part = message[:room]
    while (num_bytes := len(json.dumps(part)) - 2) > room:
        part = part[: min(len(part) * room // num_bytes, len(part) - 1)]
    if len(part) < len(message) and (end := part.rfind("\n")) > 0:
        part = part[:end]
    return LOGGED + json.dumps([*head, part]).encode() + b"\n", message[len(part) :].removeprefix("\n")


def read_line(worker: str, line: bytes) -> WorkerLogged | None:
    """Return the record of a worker's line, without the mark; None if it has another form."""
    try:
        message = json.loads(line)
    except (ValueError, RecursionError):
        return None
    match message:
        case [int(level), str(logger), str() | None as client_id, int() | float() as created, str(text)] if (
            type(level) is int and 0 <= level < 1000 and math.isfinite(created)
        ):
            return WorkerLogged(worker, client_id, level, _shown(logger), _shown(text), float(created))
    return None


def _shown(text: str) -> str:
    """Return a text of a worker with its control characters escaped, since it goes to terminals and log files."""
    if text.isprintable():
        return text
    return "".join(
        character if character.isprintable() or character in "\n\t" else character.encode("unicode_escape").decode()
        for character in text
    )
