"""Consistent snapshot: the states of many learners as of one moment, taken while the run goes on."""

from __future__ import annotations

import asyncio
from collections import OrderedDict, deque
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable
from typing import Any

from torchfedrpc.executors.snapshot_throttle import SnapshotBudget


class Cut(AsyncIterator[tuple[str, bytes]]):
    """Consistent snapshot of learners: ``async for client_id, data in cut``, in any order.

    Few snapshots are in flight at a time, so that they are never all in memory. A call of a learner waits until the
    learner's snapshot was requested (`passed`), and moves that request to the front of the queue. Calls no longer
    wait after all snapshots were requested, or after `close`.

    Args:
        client_ids: The clients.
        take: Returns a learner's snapshot, taken behind the calls submitted before. It sends the request in its first
            step.
    """

    def __init__(self, client_ids: Iterable[str], take: Callable[[str], Coroutine[Any, Any, bytes]]) -> None:
        self._untaken = OrderedDict.fromkeys(client_ids)
        self._wanted: deque[str] = deque()
        self._gates: dict[str, _Gate] = {}  # of learners with waiting calls
        self._taking: dict[asyncio.Task[bytes], str] = {}
        self._take = take
        self._budget = SnapshotBudget()

    async def passed(self, client_id: str) -> None:
        """Wait until the snapshot of this learner was requested. Callers continue in FIFO order."""
        if client_id in self._untaken:
            self._gates.setdefault(client_id, _Gate())
            self._wanted.append(client_id)
            self._fill()
        if (gate := self._gates.get(client_id)) is not None:
            await gate.passed()
            if gate.is_idle:
                self._gates.pop(client_id, None)

    async def __anext__(self) -> tuple[str, bytes]:
        self._fill()
        if not self._taking:
            raise StopAsyncIteration
        done, _ = await asyncio.wait(self._taking, return_when=asyncio.FIRST_COMPLETED)
        task = done.pop()
        client_id, data = self._taking.pop(task), task.result()
        self._budget.saw(len(data))
        return client_id, data

    def close(self) -> None:
        """Request no further snapshots, cancel those in flight, and let waiting calls continue."""
        for task in self._taking:
            task.cancel()
            task.add_done_callback(_retrieve)
        self._untaken.clear()
        for client_id in list(self._gates):
            self._open(client_id)

    def _fill(self) -> None:
        while self._untaken and self._budget.fits(len(self._taking)):
            wanted = self._wanted.popleft() if self._wanted else next(iter(self._untaken))
            if wanted not in self._untaken:  # several calls of one learner waited
                continue
            del self._untaken[wanted]
            self._gates.setdefault(wanted, _Gate())
            self._taking[asyncio.ensure_future(self._take(wanted))] = wanted
            # The task sends its request in its first step; the loop runs that step before this callback.
            asyncio.get_running_loop().call_soon(self._open, wanted)

    def _open(self, client_id: str) -> None:
        if (gate := self._gates.get(client_id)) is not None:
            gate.open()
            if gate.is_idle:
                del self._gates[client_id]


def _retrieve(task: asyncio.Task[bytes]) -> None:
    """Retrieve the exception of an abandoned task, so that asyncio does not log it."""
    if not task.cancelled():
        task.exception()


class _Gate:
    """FIFO gate that blocks callers until it is opened."""

    def __init__(self) -> None:
        self._is_open = False
        self._waiting: deque[asyncio.Future[None]] = deque()

    @property
    def is_idle(self) -> bool:
        """Whether the gate is open and has no waiting callers."""
        return self._is_open and not self._waiting

    def open(self) -> None:
        """Wake the first caller; each caller wakes the next one."""
        self._is_open = True
        if self._waiting and not self._waiting[0].done():
            self._waiting[0].set_result(None)

    async def passed(self) -> None:
        """Wait in FIFO order until the gate is open."""
        if self.is_idle:
            return
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append(turn)
        try:
            await turn
        finally:
            self._waiting.remove(turn)
            if self._is_open:
                self.open()
