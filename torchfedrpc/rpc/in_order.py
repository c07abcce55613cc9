"""Requests put back in the order in which they were sent: RPC hands them to several threads, which overtake."""

from __future__ import annotations

import threading
from collections.abc import Callable


class InOrder:
    """Runs actions in the order of their numbers, 0, 1, 2, ..., each as soon as all before it have come."""

    def __init__(self) -> None:
        self._next = 0
        self._early: dict[int, Callable[[], object]] = {}
        self._lock = threading.Lock()

    def put(self, number: int, action: Callable[[], object]) -> None:
        """Run ``action`` in its turn, on this or a later caller's thread; it must not wait for anything."""
        with self._lock:
            self._early[number] = action
            while (due := self._early.pop(self._next, None)) is not None:
                self._next += 1
                due()
