"""A consistent cut: the states of many learners as of one moment, taken while the run goes on."""

from __future__ import annotations

import asyncio
from collections import OrderedDict, deque
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable
from typing import Any

from torchfedrpc.executors.snapshot_throttle import SnapshotBudget


class Cut(AsyncIterator[tuple[str, bytes]]):
    """The states of some learners as of now: ``async for client_id, data in cut``, in whichever order they come.

    Few are taken at a time, so that they are never all in memory. A call of a learner whose state was not asked for
    yet waits for that (`passed`), and brings it to the front. Nobody waits once the states are taken, or after
    `close`.

    Args:
        client_ids: whose.
        take: gives a learner's state behind the calls that were submitted before; asks for it at its first step.
    """

    def __init__(self, client_ids: Iterable[str], take: Callable[[str], Coroutine[Any, Any, bytes]]) -> None:
        self._untaken = OrderedDict.fromkeys(client_ids)
        self._wanted: deque[str] = deque()
        self._gates: dict[str, _Gate] = {}  # of learners whose calls wait, or are on their way through
        self._taking: dict[asyncio.Task[bytes], str] = {}
        self._take = take
        self._budget = SnapshotBudget()

    async def passed(self, client_id: str) -> None:
        """Wait until the state of this learner was asked for; calls go on in the order in which they came here."""
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
        """Take no more states, and keep nobody back."""
        for task in self._taking:
            task.cancel()
            task.add_done_callback(_retrieve)
        self._untaken.clear()
        for client_id in list(self._gates):
            self._open(client_id)

    def _fill(self) -> None:
        while self._untaken and self._budget.fits(len(self._taking)):
            wanted = self._wanted.popleft() if self._wanted else next(iter(self._untaken))
            if wanted not in self._untaken:  # it was wanted by several calls
                continue
            del self._untaken[wanted]
            self._gates.setdefault(wanted, _Gate())
            self._taking[asyncio.ensure_future(self._take(wanted))] = wanted
            # The task asks at its first step, which the loop takes before this.
            asyncio.get_running_loop().call_soon(self._open, wanted)

    def _open(self, client_id: str) -> None:
        if (gate := self._gates.get(client_id)) is not None:
            gate.open()
            if gate.is_idle:
                del self._gates[client_id]


def _retrieve(task: asyncio.Task[bytes]) -> None:
    """Take notice of what a task that nobody awaits has come to."""
    if not task.cancelled():
        task.exception()


class _Gate:
    """Keeps callers back until it is opened, and lets them through in the order in which they came."""

    def __init__(self) -> None:
        self._is_open = False
        self._waiting: deque[asyncio.Future[None]] = deque()

    @property
    def is_idle(self) -> bool:
        """Whether it is open and nobody is on the way through."""
        return self._is_open and not self._waiting

    def open(self) -> None:
        """Let the first one through, who lets the next."""
        self._is_open = True
        if self._waiting and not self._waiting[0].done():
            self._waiting[0].set_result(None)

    async def passed(self) -> None:
        """Wait for one's turn."""
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
