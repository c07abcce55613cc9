"""Restores the order in which requests were sent. RPC delivers them on several threads, which may overtake."""

from __future__ import annotations

import threading
from collections.abc import Callable

from torchfedrpc.errors import SerializationError

_MAX_EARLY = 1 << 16  # RPC's few threads overtake each other by tens, so that larger gaps are not the driver's


class InOrder:
    """Runs actions in the order of their numbers, 0, 1, 2, ..., each as soon as all earlier ones have arrived."""

    def __init__(self) -> None:
        self._next = 0
        self._early: dict[int, Callable[[], object]] = {}
        self._lock = threading.Lock()

    def check(self, number: int) -> None:
        """Check that an action of this number can still be put.

        Raises:
            SerializationError: If an action of this number was put before, or the number is far ahead.
        """
        with self._lock:
            if not self._next <= number < self._next + _MAX_EARLY or number in self._early:
                raise SerializationError(f"request {number} cannot follow, number {self._next} is the next")

    def put(self, number: int, action: Callable[[], object]) -> None:
        """Run an action in its turn, on this thread or that of a later caller. The action must not block."""
        with self._lock:
            self._early[number] = action
            while (due := self._early.pop(self._next, None)) is not None:
                self._next += 1
                due()
