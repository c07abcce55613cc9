"""`LearnerStream`: iterates over the items of a learner's generator method."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator
from typing import Any

from torchfedrpc.calls import Calls, reading
from torchfedrpc.errors import ConfigError, LearnerBusyError
from torchfedrpc.executors.base import Invocation
from torchfedrpc.executors.stream import ItemStream
from torchfedrpc.options import CallOptions
from torchfedrpc.tasks import call_on

_numbers = itertools.count()  # of streams; unique in this process


class LearnerStream(AsyncIterator[Any]):
    """Async iterator over the items of a learner's generator method; `LearnerProxy.stream` returns it.

    `asend` sends a value into the generator with the request for the next item.

    Leaving the loop drops the last reference and thereby closes the generator on its host. If a variable holds the
    stream, close it explicitly (`aclose`, or ``contextlib.aclosing``).
    """

    def __init__(self, calls: Calls, options: CallOptions, invocation: Invocation, stream: ItemStream) -> None:
        self._calls = calls
        self._options = options
        self._invocation = invocation
        self._stream = stream
        self._opening = calls.opening
        self._number = next(_numbers)
        self._is_stepping = self._has_begun = False
        self._loop: asyncio.AbstractEventLoop | None = None  # the loop of the reader

    async def __anext__(self) -> Any:
        return await self.asend(None)

    async def asend(self, value: Any) -> Any:
        """Send a value into the generator, as the result of the ``yield`` where it waits, and return the next item.

        The value is taken by value, as an argument of a call. The first step takes None, since no ``yield`` waits
        yet. A stream that has been sent values cannot be replayed after a loss: a snapshot of the learner follows it.

        Raises:
            TypeError: If the first value is not None, or the method's iterator takes no values. The first of these
                leaves the stream as it is.
            SerializationError: If the value cannot be sent. The stream is closed then.
            StopAsyncIteration: If there is no further item.
        """
        invocation = self._invocation
        self._loop = asyncio.get_running_loop()
        self._calls.check_open()
        if self._opening is not self._calls.opening:
            raise ConfigError(
                f"the stream of {invocation.client_id}.{invocation.method} was opened before the proxy was closed: "
                f"open another, proxy.stream({invocation.client_id!r}, {invocation.method!r}, ...)"
            )
        if self._is_stepping:
            raise LearnerBusyError(
                f"the stream of {invocation.client_id}.{invocation.method} is already waiting for an item: one loop "
                f"reads a stream; open another for a second reader"
            )
        if value is not None and not self._has_begun:
            raise TypeError(
                f"the stream of {invocation.client_id}.{invocation.method} begins with None, and not with a value, "
                f"which no yield awaits yet: take the first item by anext(stream) or stream.asend(None)"
            )
        self._calls.check_capacity(invocation.client_id, invocation.method)  # a refused stream can go on later
        open_streams = self._opening.open_streams
        if self._number not in open_streams:
            self._calls.check_not_reading(invocation.client_id, invocation.method)
            open_streams[self._number] = invocation.client_id
        still_open = frozenset(stream for stream in reading.get() if stream in open_streams)
        reading.set(still_open | {self._number})
        self._is_stepping = self._has_begun = True
        try:
            step = self._stream.step() if value is None else self._stream.step(value)
            return await self._calls.observed(self._options, invocation, step)
        except BaseException:
            self._close()
            raise
        finally:
            self._is_stepping = False

    async def aclose(self) -> None:
        """Close the generator on its host. The learner's next call runs after that."""
        self._close()

    def _close(self) -> None:
        self._opening.open_streams.pop(self._number, None)
        self._stream.close()

    def __del__(self) -> None:
        self._opening.open_streams.pop(self._number, None)
        if self._loop is not None:
            # Deferred: garbage collection may run while this thread holds the lock that closing takes.
            call_on(self._loop, self._stream.close)
