"""Lock between sync methods, which may run concurrently, and steps of async methods, which run alone."""

from __future__ import annotations

import threading


class MethodLock:
    """A fair lock with shared and exclusive holders, granted in the order of the requests."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)
        self._next_ticket = 0
        self._serving = 0
        self._num_sharing = 0
        self._exclusive = False

    def enter(self, *, exclusive: bool) -> None:
        """Wait for the lock."""
        with self._lock:
            ticket = self._next_ticket
            self._next_ticket += 1
            while ticket != self._serving or self._exclusive or (exclusive and self._num_sharing):
                self._changed.wait()
            self._serving += 1
            if exclusive:
                self._exclusive = True
            else:
                self._num_sharing += 1
            self._notify()

    def leave(self, *, exclusive: bool) -> None:
        """Release the lock."""
        with self._lock:
            if exclusive:
                self._exclusive = False
            else:
                self._num_sharing -= 1
            self._notify()

    def _notify(self) -> None:
        if self._serving != self._next_ticket:
            self._changed.notify_all()
