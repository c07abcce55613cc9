"""Deadlines of running methods, kept by a thread that no method can block."""

from __future__ import annotations

import sys
import threading
import time
import types
from collections.abc import Callable, Hashable


class Deadlines:
    """Calls back when the time of a running call is over.

    Args:
        expire: Called with the key whose time is over, on the thread of this object.
    """

    def __init__(self, expire: Callable[[Hashable], None]) -> None:
        self._expire = expire
        self._due: dict[Hashable, float] = {}
        self._changed = threading.Condition()
        self._wakes_at = 0.0
        self._thread: threading.Thread | None = None
        self._closed = False

    def start(self, key: Hashable, timeout_s: float) -> None:
        """Let ``key`` expire in ``timeout_s`` seconds."""
        due = time.monotonic() + timeout_s
        with self._changed:
            self._due[key] = due
            if self._thread is None:
                self._thread = threading.Thread(target=self._watch, name="torchfedrpc-deadlines", daemon=True)
                self._thread.start()
            elif due < self._wakes_at:
                self._changed.notify()

    def stop(self, key: Hashable) -> float | None:
        """Stop the clock of ``key``.

        Returns:
            Remaining seconds; None if no clock runs for the key.
        """
        with self._changed:
            due = self._due.pop(key, None)
        return None if due is None else max(due - time.monotonic(), 0.0)

    def close(self) -> None:
        """End the thread."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        if self._thread is not None:
            self._thread.join()

    def _watch(self) -> None:
        while True:
            with self._changed:
                if self._closed:
                    return
                now = time.monotonic()
                late = [key for key, due in self._due.items() if due <= now]
                for key in late:
                    del self._due[key]
                if not late:
                    self._wakes_at = min(self._due.values(), default=now + 3600.0)
                    self._changed.wait(self._wakes_at - now)
                    self._wakes_at = 0.0
            for key in late:
                self._expire(key)


def debugger_attached() -> bool:
    """Return whether a debugger is active: a thread is in pdb, or the debugger of an IDE is attached."""
    debugpy, pydevd = sys.modules.get("debugpy"), sys.modules.get("pydevd")
    if debugpy is not None and debugpy.is_client_connected():
        return True
    if pydevd is not None and getattr(pydevd, "connected", False):
        return True
    return any(_stands_in_pdb(frame) for frame in list(sys._current_frames().values()))


def _stands_in_pdb(frame: types.FrameType | None) -> bool:
    while frame is not None:
        if frame.f_globals.get("__name__") in ("bdb", "pdb"):
            return True
        frame = frame.f_back
    return False
