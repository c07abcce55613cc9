"""Lock between sync methods, which may run concurrently, and steps of async methods, which run alone."""

from __future__ import annotations

import threading
from types import TracebackType


class Gate:
    """A fair lock with shared and exclusive holders, granted in the order of the requests.

    Attributes:
        shared: ``with gate.shared:`` holds the lock together with other shared holders.
        exclusive: ``with gate.exclusive:`` holds the lock alone.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._next_ticket = 0
        self._serving = 0
        self._num_sharing = 0
        self._exclusive = False
        self.shared = _Side(self, exclusive=False)
        self.exclusive = _Side(self, exclusive=True)

    def enter(self, *, exclusive: bool) -> None:
        """Wait for the lock."""
        with self._changed:
            ticket = self._next_ticket
            self._next_ticket += 1
            while ticket != self._serving or self._exclusive or (exclusive and self._num_sharing):
                self._changed.wait()
            self._serving += 1
            if exclusive:
                self._exclusive = True
            else:
                self._num_sharing += 1
                self._changed.notify_all()

    def leave(self, *, exclusive: bool) -> None:
        """Release the lock."""
        with self._changed:
            if exclusive:
                self._exclusive = False
            else:
                self._num_sharing -= 1
            self._changed.notify_all()


class _Side:
    """One way to hold a gate, as a context manager for any number of threads."""

    __slots__ = ("_exclusive", "_gate")

    def __init__(self, gate: Gate, *, exclusive: bool) -> None:
        self._gate = gate
        self._exclusive = exclusive

    def __enter__(self) -> None:
        self._gate.enter(exclusive=self._exclusive)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._gate.leave(exclusive=self._exclusive)
