"""Consistent snapshot: the states of many learners as of one moment, taken while the run goes on."""

from __future__ import annotations

import asyncio
from collections import OrderedDict, deque
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable
from typing import Any

from torchfedrpc.executors.snapshot_throttle import SnapshotBudget
from torchfedrpc.tasks import Turns

_STUCK_S = 1.0  # a snapshot that takes longer waits for a call that was cut off, and holds up no other learner


class Cut(AsyncIterator[tuple[str, bytes]]):
    """Consistent snapshot of learners: ``async for client_id, data in cut``, in any order.

    Few snapshots are in flight at a time, so that they are never all in memory; those that a busy learner holds up do
    not count. A call of a learner waits until the learner's snapshot was requested (`passed`), and moves that request
    to the front of the queue. Calls no longer wait after all snapshots were requested, or after `close`.

    Args:
        client_ids: The clients.
        take: Returns a learner's snapshot, taken behind the calls submitted before. It sends the request in its first
            step.
    """

    def __init__(self, client_ids: Iterable[str], take: Callable[[str], Coroutine[Any, Any, bytes]]) -> None:
        self._untaken = OrderedDict.fromkeys(client_ids)
        self._wanted: deque[str] = deque()
        self._locks: dict[str, Turns] = {}  # client -> FIFO lock of its calls, as long as it is held
        self._locked: set[str] = set()  # clients whose lock this object holds, until their snapshot is requested
        self._taking: dict[asyncio.Task[bytes], tuple[str, float]] = {}  # each with its client and when it began
        self._take = take
        self._budget = SnapshotBudget()

    @property
    def is_over(self) -> bool:
        """Whether no call waits, and no later one will."""
        return not self._untaken and not self._locks

    async def passed(self, *client_ids: str) -> None:
        """Wait until the snapshots of these learners were requested. Callers of a learner continue in FIFO order.

        A caller for several learners holds back the later callers of each until it continues.
        """
        for client_id in client_ids:
            if client_id in self._untaken:
                self._lock(client_id)
                self._wanted.append(client_id)
        self._fill()
        locks = {client_id: self._locks[client_id] for client_id in client_ids if client_id in self._locks}
        turns = [lock.request() for lock in locks.values()]
        try:
            for turn in turns:
                while not turn.done():
                    await asyncio.wait([turn], timeout=_STUCK_S)
                    self._fill()  # a snapshot in flight for that long no longer counts in the budget
        finally:  # the lock of a cancelled turn may be free, and dropped, by now
            for (client_id, lock), turn in zip(locks.items(), turns, strict=True):
                lock.withdraw(turn)
                self._drop_free_lock(client_id)

    async def __anext__(self) -> tuple[str, bytes]:
        self._fill()
        if not self._taking:
            raise StopAsyncIteration
        done, _ = await asyncio.wait(self._taking, return_when=asyncio.FIRST_COMPLETED)
        task = done.pop()
        (client_id, _), data = self._taking.pop(task), task.result()
        self._budget.saw(len(data))
        return client_id, data

    def close(self) -> None:
        """Request no further snapshots, cancel those in flight, and let waiting calls continue."""
        for task in self._taking:
            task.cancel()
            task.add_done_callback(_retrieve)
        self._untaken.clear()
        for client_id in list(self._locked):
            self._unlock(client_id)

    def _fill(self) -> None:
        loop = asyncio.get_running_loop()
        while self._untaken and self._budget.fits(
            sum(task.done() or loop.time() - began < _STUCK_S for task, (_, began) in self._taking.items())
        ):
            wanted = self._wanted.popleft() if self._wanted else next(iter(self._untaken))
            if wanted not in self._untaken:  # several calls of one learner waited
                continue
            del self._untaken[wanted]
            self._lock(wanted)
            self._taking[asyncio.ensure_future(self._take(wanted))] = wanted, loop.time()
            # The task sends its request in its first step; the loop runs that step before this callback.
            loop.call_soon(self._unlock, wanted)

    def _lock(self, client_id: str) -> None:
        if client_id not in self._locked:
            self._locked.add(client_id)
            self._locks.setdefault(client_id, Turns()).take_now()

    def _unlock(self, client_id: str) -> None:
        if client_id in self._locked:
            self._locked.discard(client_id)
            self._locks[client_id].give()
            self._drop_free_lock(client_id)

    def _drop_free_lock(self, client_id: str) -> None:
        if client_id in self._locks and not self._locks[client_id].is_held:
            del self._locks[client_id]


def _retrieve(task: asyncio.Task[bytes]) -> None:
    """Retrieve the exception of an abandoned task, so that asyncio does not log it."""
    if not task.cancelled():
        task.exception()
