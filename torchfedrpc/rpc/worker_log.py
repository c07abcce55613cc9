"""What a worker logs and prints, as lines on a pipe to its heartbeat process, which sends them to the driver.

A pipe keeps what was written if the worker is killed, and is written in a few microseconds. It is never waited for: a
record that does not fit is dropped, and the next one that fits tells how many were.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import logging
import os
import re
import select
import sys
import threading
import time
from collections import deque
from collections.abc import Sequence
from typing import Any, TextIO

from torchfedrpc.config import LogLevel
from torchfedrpc.host.call_scope import client_here
from torchfedrpc.rpc.log_line import line_of

STREAMS = ("stdout", "stderr")

_MAX_MESSAGE = 64 << 10  # characters
_MAX_NAME = 100
_MAX_UNFINISHED = 8 << 10  # characters of a line without an end, such as that of a progress bar
_LAST_S = 0.5
_COLOURS = re.compile(r"\x1b\[[0-9;]*m")

Identity = tuple[int, int]
"""Device and inode of an open file, which tell whether two processes have the same one."""


def identities() -> list[Identity | None]:
    """Return the files that stdout and stderr of this process are; None if they are closed."""
    found: list[Identity | None] = []
    for descriptor in (1, 2):
        try:
            status = os.fstat(descriptor)
            found.append((status.st_dev, status.st_ino))
        except OSError:
            found.append(None)
    return found


class WorkerLog:
    """Context manager that sends log records, warnings and printed lines of this process to the driver.

    What is printed goes to this process's own stream as well, unless that is the driver's: there the driver shows it.
    Output of native libraries, and bytes written to ``sys.stdout.buffer``, are not touched.

    Args:
        pipe: Descriptor of the pipe, which does not block.
        level: Level from which records are sent. Printed lines have the level INFO.
        streams_of_driver: The `identities` of the driver's streams, if it is on this machine.
    """

    def __init__(self, pipe: int, level: LogLevel, streams_of_driver: Sequence[Identity | None] = ()) -> None:
        self._pipe = pipe
        self._level = level.number
        self._are_shared = [
            own is not None and own == other for own, other in zip(identities(), streams_of_driver, strict=False)
        ] or [False, False]
        self._written = itertools.count()  # counts without a lock, which a print in a signal handler could need
        self._dropped: deque[None] = deque()
        self._undo = contextlib.ExitStack()
        self._lines: list[_Lines] = []

    def __enter__(self) -> WorkerLog:
        if self._level > logging.CRITICAL:
            return self
        root = logging.getLogger()
        handler = _Handler(self)
        self._undo.callback(root.setLevel, root.level)
        root.setLevel(self._level)
        root.addHandler(handler)
        self._undo.callback(root.removeHandler, handler)
        if not self._are_shared[1]:  # where warnings are to be seen as before
            own = logging.StreamHandler(sys.stderr)
            own.setLevel(logging.WARNING)
            root.addHandler(own)
            self._undo.callback(root.removeHandler, own)
        if logging.getLogger("py.warnings").isEnabledFor(logging.WARNING):
            logging.captureWarnings(True)
            self._undo.callback(logging.captureWarnings, False)
        if self._level <= logging.INFO:
            for name, is_shared in zip(STREAMS, self._are_shared, strict=True):
                own_stream: TextIO = getattr(sys, name)
                lines = _Lines(self, name, own_stream, echoes=not is_shared)
                self._lines.append(lines)
                setattr(sys, name, lines)
                self._undo.callback(_put_back, name, lines, own_stream)
        return self

    def __exit__(self, *_: object) -> None:
        self._undo.close()
        for lines in self._lines:
            lines.finish()
        poll = select.poll()
        poll.register(self._pipe, select.POLLOUT)
        if self._dropped and poll.poll(_LAST_S * 1000):
            self._tell_dropped()

    def num_written(self) -> int:
        """Return the number of lines that were written to the pipe; call it once."""
        return next(self._written)

    def put(self, level: int, logger: str, message: str, created: float) -> None:
        """Send a record; one that is longer than a line as several."""
        message = _COLOURS.sub("", message)
        if len(message) > _MAX_MESSAGE:
            left_out = len(message) - _MAX_MESSAGE
            message = f"{message[:_MAX_MESSAGE]} ... ({left_out} characters are left out)"
        client_id = client_here()
        while True:
            line, message = line_of((level, logger[:_MAX_NAME], client_id, created), message)
            if (self._dropped and not self._tell_dropped()) or not self._write(line):
                self._dropped.append(None)
            if not message:
                return

    def _tell_dropped(self) -> bool:
        """Tell how many lines were dropped. Returns whether that fits."""
        count = len(self._dropped)
        text = f"{count} lines were dropped here, since they came faster than they could be sent"
        line, _ = line_of((logging.WARNING, __name__, None, time.time()), text)
        if not self._write(line):
            return False
        for _ in range(min(count, len(self._dropped))):
            self._dropped.popleft()
        return True

    def _write(self, line: bytes) -> bool:
        try:
            os.write(self._pipe, line)
        except OSError:  # full, or the heartbeat process is gone
            return False
        next(self._written)
        return True


def _put_back(name: str, lines: _Lines, own: TextIO) -> None:
    if getattr(sys, name) is lines:
        setattr(sys, name, own)


class _Handler(logging.Handler):
    def __init__(self, log: WorkerLog) -> None:
        super().__init__()
        self._log = log

    def createLock(self) -> None:
        """Have no lock, which a forked child could find held."""
        self.lock = None

    def emit(self, record: logging.LogRecord) -> None:
        try:
            self._log.put(record.levelno, record.name, self.format(record).rstrip("\n"), record.created)
        except Exception:
            self.handleError(record)


class _Lines(io.TextIOBase):
    """Stream that sends each line that is printed to it, and passes other uses on to the stream that it replaces."""

    def __init__(self, log: WorkerLog, name: str, own: TextIO, *, echoes: bool) -> None:
        self._log = log
        self._name = name
        self._own = own
        self._echoes = echoes
        self._unfinished: dict[tuple[int, str | None], str] = {}  # by thread and client

    def write(self, text: str) -> int:
        """Send the lines that end in a text."""
        if not isinstance(text, str):
            raise TypeError(f"write() argument must be str, not {type(text).__name__}")
        text.encode(self.encoding, self.errors)  # an error here as elsewhere
        if self._echoes:
            self._own.write(text)
        key = (threading.get_ident(), client_here())
        *lines, unfinished = (self._unfinished.pop(key, "") + text).split("\n")
        for line in lines:
            self._send(line)
        unfinished = unfinished[unfinished.rfind("\r", 0, -1) + 1 :]  # a progress bar writes over its line
        if len(unfinished) > _MAX_UNFINISHED:
            self._send(unfinished)
        elif unfinished:
            self._unfinished[key] = unfinished
        return len(text)

    def _send(self, line: str) -> None:
        line = line.rstrip("\r")
        if line := line[line.rfind("\r") + 1 :]:
            self._log.put(logging.INFO, self._name, line, time.time())

    def finish(self) -> None:
        """Send the lines that have no end."""
        while self._unfinished:
            _, line = self._unfinished.popitem()
            self._send(line)

    def flush(self) -> None:
        """Flush the stream that this one replaces."""
        self._own.flush()

    def isatty(self) -> bool:
        """Whether the stream that this one replaces is a terminal that shows what is printed."""
        return self._echoes and self._own.isatty()

    def fileno(self) -> int:
        """Return the descriptor of the stream that this one replaces."""
        return self._own.fileno()

    @property
    def encoding(self) -> str:  # type: ignore[override]
        """The encoding of the stream that this one replaces."""
        return self._own.encoding or "utf-8"

    @property
    def errors(self) -> str:  # type: ignore[override]
        """How the stream that this one replaces treats characters that it cannot encode."""
        return self._own.errors or "strict"

    def writable(self) -> bool:
        """Whether it can be written: it can."""
        return True

    def close(self) -> None:
        """Stay open, as the streams of a process do."""

    def __getattr__(self, name: str) -> Any:
        return getattr(self._own, name)
