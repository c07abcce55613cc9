"""Log records of learners in the driver's logging: prefixed with worker and client, and as events."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import sys
from collections.abc import Callable
from typing import Any

from torchfedrpc.events import EventBus, WorkerLogged
from torchfedrpc.host.call_scope import client_here
from torchfedrpc.tasks import call_on

STREAMS = ("stdout", "stderr")
_PRINTED = "torchfedrpc.workers"
_FORMATTER = logging.Formatter()


def prefix(worker: str, client_id: str | None) -> str:
    """Return the prefix of a line of a worker, such as ``[worker1 client_3] ``."""
    return f"[{worker} {client_id}] " if client_id is not None else f"[{worker}] "


def relay(logged: WorkerLogged) -> None:
    """Pass a record of a worker on to the logger of its name, with its own time.

    A printed line goes to the logger ``torchfedrpc.workers``. If no handler would get it there, it is printed.
    """
    text, is_printed = prefix(logged.worker, logged.client_id) + logged.message, logged.logger in STREAMS
    name = _PRINTED if is_printed else logged.logger
    logger = _logger(name)
    if is_printed and not (logger.isEnabledFor(logged.level) and logger.hasHandlers()):
        stream = getattr(sys, logged.logger)
        if stream is not None:
            encoding = getattr(stream, "encoding", None) or "utf-8"
            print(text.encode(encoding, "backslashreplace").decode(encoding), file=stream, flush=True)
        return
    if logger.isEnabledFor(logged.level):
        record = logger.makeRecord(name, logged.level, f"({logged.worker})", 0, text, (), None)
        record.created, record.msecs = logged.time, (logged.time - int(logged.time)) * 1000
        logger.handle(record)


def _logger(name: str) -> logging.Logger:
    """Return a logger, or the nearest one above it that exists: a worker's names must not fill the driver's table."""
    known = logging.root.manager.loggerDict
    while name:
        if isinstance(logger := known.get(name), logging.Logger):
            return logger
        name = name.rpartition(".")[0]
    return logging.root


class LocalLog:
    """Treats the records of learners in the driver's process as those of workers: with a prefix, and as events.

    It makes the records, and is no handler: with one, Python would no longer print the warnings of a script without a
    configuration of logging. Printed lines are not touched: they are on the driver's streams already, and a debugger
    may use these.

    Args:
        worker: Name of the process.
        level: Level from which records become events.
        events: Publishes them, on the event loop that runs now.
    """

    def __init__(self, worker: str, level: int, events: EventBus) -> None:
        self._worker = worker
        self._level = level
        self._events = events
        self._loop = asyncio.get_running_loop()
        self._before: Callable[..., logging.LogRecord] | None = None

    def open(self) -> None:
        """Make records from now on."""
        self._before = logging.getLogRecordFactory()
        logging.setLogRecordFactory(self._make)

    def close(self) -> None:
        """Let records be made as before. One that replaces this in the meantime stays, and still calls it."""
        if logging.getLogRecordFactory() == self._make and self._before is not None:
            logging.setLogRecordFactory(self._before)
        self._level = sys.maxsize

    def _make(self, *args: Any, **kwargs: Any) -> logging.LogRecord:
        assert self._before is not None
        record = self._before(*args, **kwargs)
        client_id = client_here() if record.levelno is not None and record.levelno >= self._level else None
        if client_id is not None and _reaches_root(record.name):
            with contextlib.suppress(Exception):  # a message that cannot be formatted, which the handlers tell
                self._publish(record, client_id)
        return record

    def _publish(self, record: logging.LogRecord, client_id: str) -> None:
        message = record.getMessage()
        text = _FORMATTER.format(record) if record.exc_info else message
        event = WorkerLogged(self._worker, client_id, record.levelno, record.name, text, record.created)
        call_on(self._loop, self._events.publish, event)
        record.msg, record.args = prefix(self._worker, client_id) + message, ()


def _reaches_root(name: str) -> bool:
    logger: logging.Logger | None = logging.getLogger(name)
    while logger is not None and logger.propagate:
        logger = logger.parent
    return logger is None
