"""A pool that keeps a number of calls in flight, and gives their results one by one."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torchfedrpc.errors import ConfigError

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
        task: The task of the call; None once its result was restored from a checkpoint.
        result: That result.
    """

    number: int
    client_id: str
    due_s: float
    task: asyncio.Future[Any] | None = None
    result: Any = None


class LearnerPool:
    """Asynchronous iterator over ``(client_id, result)`` that keeps ``num_in_flight`` calls in flight.

    The next call begins when the next result is asked for, so the loop's body comes before it. Without ``clock``
    results come as calls end. With it they come in the order of a virtual clock, which depends neither on mode nor on
    the speed of machines: the same bits each time.

    The pool is part of the state of a trainer that keeps it as an attribute: a checkpoint waits for the calls in
    flight, and has their results.

    Args:
        next_client: Returns the next client and its call, or None if there are no more.
        num_in_flight: Number of calls in flight, at least 1.
        clock: Durations of simulated calls, such as `torchfedrpc.SimulatedClients.seconds`.

    Attributes:
        last_client: Client of the last result, or exception.
        now_s: Virtual time of the last result, in seconds; 0 without a clock.

    Raises:
        ConfigError: If ``num_in_flight`` is no whole number of at least 1.
    """

    def __init__(self, next_client: NextClient, num_in_flight: int, clock: Clock | None = None) -> None:
        if not isinstance(num_in_flight, int) or isinstance(num_in_flight, bool) or num_in_flight < 1:
            raise ConfigError(f"pool: num_in_flight must be a whole number of at least 1, not {num_in_flight!r}")
        self.now_s = 0.0
        self.last_client = ""
        self._next_client = next_client
        self._num_in_flight = num_in_flight
        self._clock = clock
        self._flights: list[_Flight] = []
        self._num_begun = 0
        self._ended: asyncio.Queue[_Flight] = asyncio.Queue()  # in the order of their ends

    def __aiter__(self) -> LearnerPool:
        return self

    async def __anext__(self) -> tuple[str, Any]:
        """Begin calls, and wait for the next result.

        Raises:
            StopAsyncIteration: If there are no more calls.
            Exception: The exception of a call, in its turn. The pool goes on with the next one.
        """
        self._begin_calls()
        if not self._flights:
            raise StopAsyncIteration
        if self._clock is None:
            flight = await self._ended.get()
        else:
            flight = min(self._flights, key=lambda one: (one.due_s, one.number))
            if flight.task is not None:
                await asyncio.wait([flight.task])
            self.now_s = flight.due_s
        if flight in self._flights:  # else the pool was closed meanwhile
            self._flights.remove(flight)
        self.last_client = flight.client_id
        return flight.client_id, flight.result if flight.task is None else flight.task.result()

    @property
    def in_flight(self) -> list[str]:
        """The clients whose results have not been given yet, in the order of their calls."""
        return [flight.client_id for flight in self._flights]

    async def settle(self) -> None:
        """Wait until all calls in flight have ended; their results are kept."""
        if tasks := [flight.task for flight in self._flights if flight.task is not None]:
            await asyncio.wait(tasks)

    async def close(self) -> None:
        """Cancel the calls in flight."""
        tasks = [flight.task for flight in self._flights if flight.task is not None]
        self._flights.clear()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def state_dict(self) -> dict[str, Any]:
        """Return the results in flight, and the clock. All calls must have ended, as after `settle`.

        Raises:
            Exception: The exception of a call, which a checkpoint cannot have.
        """
        flights = [
            (
                flight.number,
                flight.client_id,
                flight.due_s,
                flight.result if flight.task is None else flight.task.result(),
            )
            for flight in self._flights
        ]
        return {"flights": flights, "num_begun": self._num_begun, "now_s": self.now_s}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore a state that `state_dict` returned, of a pool that has begun no calls."""
        self._flights = [
            _Flight(number, client, due_s, None, result) for number, client, due_s, result in state["flights"]
        ]
        self._num_begun, self.now_s = state["num_begun"], state["now_s"]
        self._ended = asyncio.Queue()
        for flight in self._flights:
            self._ended.put_nowait(flight)

    def _begin_calls(self) -> None:
        while len(self._flights) < self._num_in_flight and (following := self._next_client()) is not None:
            client_id, call = following
            task = asyncio.ensure_future(call)
            flight = _Flight(self._num_begun, client_id, self.now_s + self._seconds(client_id), task)
            self._num_begun += 1
            self._flights.append(flight)
            task.add_done_callback(lambda _, flight=flight: self._ended.put_nowait(flight))  # type: ignore[misc]

    def _seconds(self, client_id: str) -> float:
        seconds = 0.0 if self._clock is None else self._clock(client_id, self._num_begun)
        if not 0 <= seconds < math.inf:
            raise ConfigError(f"pool: the clock's duration of a call of {client_id} is {seconds!r} s")
        return seconds
