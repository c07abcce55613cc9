"""Log records of learners in the driver's logging: prefixed with worker and client, and as events."""

from __future__ import annotations

import asyncio
import logging
import sys

from torchfedrpc.events import EventBus, WorkerLogged
from torchfedrpc.host.call_scope import client_here
from torchfedrpc.tasks import call_on

STREAMS = ("stdout", "stderr")
_PRINTED = "torchfedrpc.workers"


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


class LocalLog(logging.Handler):
    """Handler that treats the records of learners in the driver's process as those of workers.

    It is the first handler of the root logger, so that the others see the prefix. Printed lines are not touched:
    they are on the driver's streams already, and a debugger may use these.

    Args:
        worker: Name of the process.
        level: Level from which records become events.
        events: Publishes them, on the event loop that runs now.
    """

    def __init__(self, worker: str, level: int, events: EventBus) -> None:
        super().__init__(level)
        self._worker = worker
        self._events = events
        self._loop = asyncio.get_running_loop()

    def open(self) -> None:
        """Add this handler to the root logger, before all others."""
        logging.root.handlers.insert(0, self)

    def emit(self, record: logging.LogRecord) -> None:
        """Publish a record that code of a learner logs. The handlers after this one see it with a prefix."""
        client_id = client_here()
        if client_id is None:
            return
        message, has_trace = record.getMessage(), record.exc_info is not None
        text = self.format(record) if has_trace else message
        event = WorkerLogged(self._worker, client_id, record.levelno, record.name, text, record.created)
        call_on(self._loop, self._events.publish, event)
        record.msg, record.args = prefix(self._worker, client_id) + message, ()

    def close(self) -> None:
        """Remove this handler from the root logger."""
        logging.root.removeHandler(self)
        super().close()
