"""The running calls of a process, in memory that outlives it.

If a worker is killed, this page shows which calls it was running; `max_recoveries` counts losses of these. The driver
cannot infer them: outcomes that were not sent are lost with the worker, so the first call without an outcome may have
ended long before the call that killed the worker began.
"""

from __future__ import annotations

import mmap
import os
import tempfile
from array import array
from collections.abc import MutableSequence

_NUM_BYTES = 4096


class Activity:
    """A page of call ids (int64, 0 for none) that another process can read at any time.

    The last two numbers are no call ids. The last is 1 after this process has asked to leave its run, the one before
    after this process was severed.

    Attributes:
        descriptor: File descriptor of the memory, for the other process.
    """

    def __init__(self) -> None:
        try:
            self.descriptor = os.memfd_create("torchfedrpc-activity")
        except (AttributeError, OSError):  # another system than Linux, or a sandbox that forbids it
            with tempfile.TemporaryFile() as file:
                self.descriptor = os.dup(file.fileno())
        os.ftruncate(self.descriptor, _NUM_BYTES)
        self._ids: MutableSequence[int] | memoryview[int] = memoryview(mmap.mmap(self.descriptor, 0)).cast("q")
        # Without a lock, which a stopped call could hold: pop and append are atomic.
        self._free = list(range(_NUM_BYTES // 8 - 2))

    @property
    def asks_to_leave(self) -> bool:
        """Whether this process asks to leave its run."""
        return bool(self._ids[-1])

    def ask_to_leave(self) -> None:
        """Ask the driver to move the learners of this process and to release it."""
        self._ids[-1] = 1

    def sever(self) -> None:
        """End the heartbeats of this process, for a test: to the driver it looks cut off."""
        self._ids[-2] = 1

    def enter(self, call_id: int) -> int | None:
        """Show a call as running.

        Args:
            call_id: The call; not 0.

        Returns:
            The slot for `leave`; None if the page is full, so that the call is not shown.

        Raises:
            ValueError: If the id is no int64.
        """
        try:
            slot = self._free.pop()
        except IndexError:
            return None
        try:
            self._ids[slot] = call_id
        except ValueError:
            self._free.append(slot)
            raise
        return slot

    def leave(self, slot: int | None) -> None:
        """Remove the call in a slot."""
        if slot is not None:
            self._ids[slot] = 0
            self._free.append(slot)

    def close(self) -> None:
        """Release the memory. Calls that still run may enter and leave without effect."""
        self._ids = array("q", bytes(_NUM_BYTES))
        os.close(self.descriptor)
