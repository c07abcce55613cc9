"""A pool that keeps a number of calls in flight, and gives their results one by one."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Mapping
from dataclasses import astuple, dataclass
from typing import Any

from torchfedrpc.errors import ConfigError
from torchfedrpc.options import OnError
from torchfedrpc.wire.allowlist import AllowList
from torchfedrpc.wire.exceptions import Failure

NextClient = Callable[[], tuple[str, Awaitable[Any]] | None]
"""Function that returns the next client and a call of it that has not begun, such as ``handle.train_epoch()``."""
Clock = Callable[[str, int], float]
"""Function that returns the virtual seconds of a call, from its client and its number in the pool, from 0."""


@dataclass(eq=False)
class _Flight:
    """A call in flight.

    Attributes:
        number: Number of the call in the pool, from 0.
        client_id: Its client.
        due_s: Virtual time of its end.
        ended: The task of the call; of a checkpoint a future that is done.
    """

    number: int
    client_id: str
    due_s: float
    ended: asyncio.Future[Any]


class LearnerPool:
    """Asynchronous iterator over ``(client_id, result)`` that keeps ``num_in_flight`` calls in flight.

    The next call begins when the next result is asked for, so the loop's body comes before it. Without ``clock``
    results come as calls end. With it they come in the order of a virtual clock, which depends neither on mode nor on
    the speed of machines: the same bits each time.

    The pool is part of the state of a trainer that keeps it as an attribute: a checkpoint waits for the calls in
    flight, and has their results and exceptions. It has one loop at a time.

    Args:
        next_client: Returns the next client and its call, or None if there are no more.
        num_in_flight: Number of calls in flight, at least 1.
        clock: Durations of simulated calls, such as `torchfedrpc.SimulatedClients.seconds`.
        on_error: ``raise`` raises the exception of a call in its turn; ``collect`` gives it as the result.
        trusted_modules: Packages of exceptions that a checkpoint gives back as they were; others are `RemoteError`s.

    Attributes:
        last_client: Client of the last result, or exception.
        now_s: Virtual time of the last result, in seconds; 0 without a clock.

    Raises:
        ConfigError: If ``num_in_flight`` is no whole number of at least 1.
    """

    def __init__(
        self,
        next_client: NextClient,
        num_in_flight: int,
        clock: Clock | None = None,
        *,
        on_error: OnError = "raise",
        trusted_modules: Iterable[str] = (),
    ) -> None:
        if not isinstance(num_in_flight, int) or isinstance(num_in_flight, bool) or num_in_flight < 1:
            raise ConfigError(f"pool: num_in_flight must be a whole number of at least 1, not {num_in_flight!r}")
        if on_error not in ("raise", "collect"):
            raise ConfigError(f"pool: on_error is 'raise' or 'collect', not {on_error!r}")
        self.now_s = 0.0
        self.last_client = ""
        self._next_client = next_client
        self._num_in_flight = num_in_flight
        self._clock = clock
        self._raises = on_error == "raise"
        self._allow = AllowList(trusted_modules)
        self._is_waiting = False
        self._flights: list[_Flight] = []
        self._num_begun = 0
        self._queue: asyncio.Queue[_Flight] = asyncio.Queue()  # in the order of their ends

    def __aiter__(self) -> LearnerPool:
        return self

    async def __anext__(self) -> tuple[str, Any]:
        """Begin calls, and wait for the next result.

        Raises:
            StopAsyncIteration: If there are no more calls.
            ConfigError: If another loop waits for the next result.
            Exception: The exception of a call, with ``on_error="raise"``. The pool goes on with the next one.
        """
        if self._is_waiting:
            raise ConfigError(
                "a pool has one loop at a time, and another one waits for its next result: make a second pool"
            )
        self._begin_calls()
        if not self._flights:
            raise StopAsyncIteration
        self._is_waiting = True
        try:
            flight = await self._next_flight()
        finally:
            self._is_waiting = False
        if flight in self._flights:  # else the pool was closed meanwhile
            self._flights.remove(flight)
        self.last_client = flight.client_id
        error = flight.ended.exception()
        return flight.client_id, flight.ended.result() if error is None or self._raises else error

    async def _next_flight(self) -> _Flight:
        if self._clock is None:
            return await self._queue.get()
        flight = min(self._flights, key=lambda one: (one.due_s, one.number))
        await asyncio.wait([flight.ended])
        self.now_s = flight.due_s
        return flight

    @property
    def in_flight(self) -> list[str]:
        """The clients whose results have not been given yet, in the order of their calls."""
        return [flight.client_id for flight in self._flights]

    async def settle(self) -> None:
        """Wait until all calls in flight have ended; their results are kept."""
        if self._flights:
            await asyncio.wait([flight.ended for flight in self._flights])

    async def close(self) -> None:
        """Cancel the calls in flight."""
        tasks = [flight.ended for flight in self._flights]
        self._flights.clear()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._queue = asyncio.Queue()

    def state_dict(self) -> dict[str, Any]:
        """Return the results and exceptions in flight, and the clock. All calls have ended, as after `settle`."""
        flights = [(one.number, one.client_id, one.due_s, *_outcome(one.ended)) for one in self._flights]
        clock = {"num_begun": self._num_begun, "now_s": self.now_s}
        return {**clock, "flights": flights, "last_client": self.last_client}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore a state that `state_dict` returned, of a pool that has begun no calls."""
        self._num_begun, self.now_s, self.last_client = state["num_begun"], state["now_s"], state["last_client"]
        self._flights, self._queue = [], asyncio.Queue()
        for number, client_id, due_s, result, failure in state["flights"]:
            ended = asyncio.get_running_loop().create_future()
            if failure is None:
                ended.set_result(result)
            else:
                ended.set_exception(Failure(*failure).restore(self._allow, f"in a call of {client_id}"))
                ended.exception()  # so that asyncio does not report it if nobody asks for it
            self._add(_Flight(number, client_id, due_s, ended))

    def _begin_calls(self) -> None:
        while len(self._flights) < self._num_in_flight and (following := self._next_client()) is not None:
            client_id, call = following
            try:
                due_s = self.now_s + self._seconds(client_id)
            except BaseException:
                if isinstance(call, Coroutine):
                    call.close()
                raise
            self._add(_Flight(self._num_begun, client_id, due_s, asyncio.ensure_future(call)))
            self._num_begun += 1

    def _add(self, flight: _Flight) -> None:
        self._flights.append(flight)
        if self._clock is None:
            queue = self._queue  # a later one is of other calls
            flight.ended.add_done_callback(lambda _: queue.put_nowait(flight))

    def _seconds(self, client_id: str) -> float:
        seconds = 0.0 if self._clock is None else self._clock(client_id, self._num_begun)
        if not 0 <= seconds < math.inf:
            raise ConfigError(f"pool: the clock's duration of a call of {client_id} is {seconds!r} s")
        return seconds


def _outcome(ended: asyncio.Future[Any]) -> tuple[Any, tuple[Any, ...] | None]:
    """Return the result of a call, and its exception as plain data."""
    error = ended.exception()
    if error is None:
        return ended.result(), None
    return None, astuple(Failure.capture(error))
