"""Which calls this process is running right now, told in memory that outlives it."""

from __future__ import annotations

import mmap
import os
import tempfile
from array import array
from collections.abc import MutableSequence

_NUM_BYTES = 4096


class Activity:
    """A page of call ids (int64, 0 for none) that another process can read, whatever becomes of this one.

    The last of them is no call's: it is not 0 once this process asks to leave its run.

    Attributes:
        descriptor: the memory's file descriptor, to be passed on.
    """

    def __init__(self) -> None:
        try:
            self.descriptor = os.memfd_create("torchfedrpc-activity")
        except (AttributeError, OSError):  # another system than Linux, or a sandbox that forbids it
            with tempfile.TemporaryFile() as file:
                self.descriptor = os.dup(file.fileno())
        os.ftruncate(self.descriptor, _NUM_BYTES)
        self._ids: MutableSequence[int] | memoryview[int] = memoryview(mmap.mmap(self.descriptor, 0)).cast("q")
        # No lock, since a lock is what a call can hold when it is stopped: pop and append are atomic.
        self._free = list(range(_NUM_BYTES // 8 - 1))

    def ask_to_leave(self) -> None:
        """Say that this process wants to leave, as soon as it can be done without."""
        self._ids[-1] = 1

    def enter(self, call_id: int) -> int | None:
        """Say that a call begins.

        Args:
            call_id: not 0.

        Returns:
            What `leave` wants; None where so many calls run that this one is left out.
        """
        try:
            slot = self._free.pop()
        except IndexError:
            return None
        self._ids[slot] = call_id
        return slot

    def leave(self, slot: int | None) -> None:
        """Say that the call of that slot is over."""
        if slot is not None:
            self._ids[slot] = 0
            self._free.append(slot)

    def close(self) -> None:
        """Give the memory back; calls that go on regardless are told of nowhere."""
        self._ids = array("q", bytes(_NUM_BYTES))
        os.close(self.descriptor)
