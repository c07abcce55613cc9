"""Deadlines of running methods, kept by a thread that no method can block."""

from __future__ import annotations

import sys
import threading
import time
import types
from collections.abc import Callable, Hashable
from typing import Any

Expire = Callable[[Any], object]


class Deadlines:
    """Clocks of calls. A thread calls back when the time of one is over. Thread-safe."""

    def __init__(self) -> None:
        self._due: dict[Hashable, tuple[float, Expire]] = {}
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)
        self._wakes_at = 0.0
        self._thread: threading.Thread | None = None
        self._closed = False

    def start(self, key: Hashable, timeout_s: float, expire: Expire) -> None:
        """Call ``expire(key)`` in ``timeout_s`` seconds, on the thread of this object."""
        due = time.monotonic() + timeout_s
        with self._lock:
            self._due[key] = due, expire
            if self._thread is None:
                self._thread = threading.Thread(target=self._watch, name="torchfedrpc-deadlines", daemon=True)
                self._thread.start()
            elif due < self._wakes_at:
                self._changed.notify()

    def stop(self, key: Hashable) -> tuple[float, Expire] | None:
        """Stop the clock of ``key``, which `HostLoop` starts again when an async method has the lock.

        Returns:
            Remaining seconds and the callback, for `start`; None if no clock runs for the key.
        """
        with self._lock:
            found = self._due.pop(key, None)
        return None if found is None else (max(found[0] - time.monotonic(), 0.0), found[1])

    def close(self) -> None:
        """End the thread."""
        with self._lock:
            self._closed = True
            self._changed.notify()
        if self._thread is not None:
            self._thread.join()

    def _watch(self) -> None:
        while True:
            with self._lock:
                if self._closed:
                    return
                now = time.monotonic()
                late = [(key, expire) for key, (due, expire) in self._due.items() if due <= now]
                for key, _ in late:
                    del self._due[key]
                if not late:
                    self._wakes_at = min((due for due, _ in self._due.values()), default=now + 3600.0)
                    self._changed.wait(self._wakes_at - now)
                    self._wakes_at = 0.0
            for key, expire in late:
                expire(key)


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
