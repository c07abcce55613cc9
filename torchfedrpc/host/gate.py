"""The gate between sync methods, which may run side by side, and the steps of async ones, which run alone."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager


class Gate:
    """A fair lock with shared and exclusive holders, served strictly in the order of their arrival."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._next_ticket = 0
        self._serving = 0
        self._num_sharing = 0
        self._exclusive = False

    @contextmanager
    def shared(self) -> Iterator[None]:
        """Hold the gate beside other shared holders."""
        self._enter(exclusive=False)
        try:
            yield
        finally:
            self._leave(exclusive=False)

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        """Hold the gate alone."""
        self._enter(exclusive=True)
        try:
            yield
        finally:
            self._leave(exclusive=True)

    def _enter(self, *, exclusive: bool) -> None:
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

    def _leave(self, *, exclusive: bool) -> None:
        with self._changed:
            if exclusive:
                self._exclusive = False
            else:
                self._num_sharing -= 1
            self._changed.notify_all()
