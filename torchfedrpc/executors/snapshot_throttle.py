"""Limit on snapshots in flight, so that they are never all in memory."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

BUDGET_BYTES = 32 << 20
"""Bound for the bytes of all snapshots in flight; a single larger snapshot is admitted alone."""

_FIRST_GUESS_BYTES = 8 << 20
_MAX_AT_ONCE = 64


class SnapshotBudget:
    """Number of snapshots that fit a budget, at least one, if all are as large as the largest seen so far."""

    def __init__(self) -> None:
        self._largest_bytes = 0

    def saw(self, num_bytes: int) -> None:
        """Record the size of a snapshot."""
        self._largest_bytes = max(self._largest_bytes, num_bytes)

    def fits(self, num_taken: int) -> bool:
        """Return whether another snapshot fits beside this number of snapshots."""
        expected_bytes = (num_taken + 1) * (self._largest_bytes or _FIRST_GUESS_BYTES)
        return not num_taken or (num_taken < _MAX_AT_ONCE and expected_bytes <= BUDGET_BYTES)


class SnapshotThrottle:
    """Semaphore for snapshots to and from one worker, in FIFO order.

    Args:
        budget: Bounds their number; shared by all workers of a run.
    """

    def __init__(self, budget: SnapshotBudget) -> None:
        self._budget = budget
        self._num_passing = 0
        self._waiting: deque[asyncio.Future[None]] = deque()

    @asynccontextmanager
    async def passing(self, num_bytes: int = 0) -> AsyncIterator[SnapshotBudget]:
        """Wait for admission of a snapshot; the block holds it.

        Args:
            num_bytes: Size of the snapshot; 0 if unknown.

        Yields:
            The budget. Report the size to it as soon as it is known.
        """
        self._budget.saw(num_bytes)
        if self._waiting or not self._budget.fits(self._num_passing):
            turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._waiting.append(turn)
            try:
                await turn
            except asyncio.CancelledError:
                if turn.done() and not turn.cancelled():
                    self._num_passing -= 1
                self._admit()
                raise
        else:
            self._num_passing += 1
        try:
            yield self._budget
        finally:
            self._num_passing -= 1
            self._admit()

    def _admit(self) -> None:
        while self._waiting and self._budget.fits(self._num_passing):
            turn = self._waiting.popleft()
            if not turn.done():
                self._num_passing += 1
                turn.set_result(None)
