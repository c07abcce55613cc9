"""Limits how many snapshots are on their way at once, so that they are never all in memory."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

BUDGET_BYTES = 32 << 20
"""Bytes of all snapshots on their way, unless a single one is larger."""

_FIRST_GUESS_BYTES = 8 << 20
_MAX_AT_ONCE = 64


class SnapshotBudget:
    """Number of snapshots that fit a budget if all are as large as the largest so far; at least one."""

    def __init__(self) -> None:
        self._largest_bytes = 0

    def saw(self, num_bytes: int) -> None:
        """Note the size of a snapshot."""
        self._largest_bytes = max(self._largest_bytes, num_bytes)

    def fits(self, num_taken: int) -> bool:
        """Return whether another snapshot fits beside so many."""
        expected_bytes = (num_taken + 1) * (self._largest_bytes or _FIRST_GUESS_BYTES)
        return not num_taken or (num_taken < _MAX_AT_ONCE and expected_bytes <= BUDGET_BYTES)


class SnapshotThrottle:
    """Admits the snapshots to and from one worker, in the order in which they ask.

    Args:
        budget: Bounds their number; all workers of a run share it.
    """

    def __init__(self, budget: SnapshotBudget) -> None:
        self._budget = budget
        self._num_passing = 0
        self._waiting: deque[asyncio.Future[None]] = deque()

    @asynccontextmanager
    async def passing(self, num_bytes: int = 0) -> AsyncIterator[SnapshotBudget]:
        """Wait until a snapshot may be on its way; it is, until the block ends.

        Args:
            num_bytes: Its size; 0 if unknown.

        Returns:
            The budget, which is to be told the size once it is known.
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
