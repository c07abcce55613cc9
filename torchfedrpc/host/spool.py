"""Byte strings on disk under keys: where snapshots wait that are too many for memory."""

from __future__ import annotations

import os
import tempfile
import threading
from collections.abc import Hashable
from typing import IO

_BLOCK_BYTES = 1 << 16


class Spool:
    """A mapping of keys to byte strings that lie in one temporary file.

    The file has no name, so that nothing of it outlives the process, however that ends; it lies where `tempfile`
    puts it (``TMPDIR``), and is made at the first `put`. It consists of blocks, and a value lies in whichever are
    free: the file grows to the most that was ever stored at once, a replaced value beside its successor, and no
    further. Every method may be called from any thread.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._file: IO[bytes] | None = None
        self._closed = False
        self._values: dict[Hashable, tuple[int, list[int]]] = {}  # key -> size in bytes, numbers of its blocks
        self._free: list[int] = []
        self._num_blocks = 0

    def put(self, key: Hashable, data: bytes | bytearray | memoryview) -> None:
        """Store a value, in place of the key's present one.

        Raises:
            OSError: the disk is full, or cannot be written; the key's present value stays.
            ValueError: the spool is closed.
        """
        view = memoryview(data).cast("B")
        with self._lock:
            if self._closed:
                raise ValueError(f"the spool is closed and cannot take {key!r}: put it before close()")
            if self._file is None:
                self._file = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115
            blocks = self._take_blocks(-(-len(view) // _BLOCK_BYTES))
            try:
                for index, block in enumerate(blocks):
                    start = index * _BLOCK_BYTES
                    _write(self._file.fileno(), view[start : start + _BLOCK_BYTES], block * _BLOCK_BYTES)
            except BaseException:
                self._free += blocks
                raise
            _, replaced = self._values.get(key, (0, []))
            self._values[key] = (len(view), blocks)
            self._free += replaced

    def get(self, key: Hashable) -> bytes:
        """The value of a key.

        Raises:
            KeyError: there is none.
            OSError: the disk cannot be read.
        """
        with self._lock:
            num_bytes, blocks = self._values[key]
            assert self._file is not None
            descriptor = self._file.fileno()
            chunks = [
                os.pread(descriptor, min(_BLOCK_BYTES, num_bytes - index * _BLOCK_BYTES), block * _BLOCK_BYTES)
                for index, block in enumerate(blocks)
            ]
        data = b"".join(chunks)
        if len(data) != num_bytes:
            raise OSError(f"the spool's file gave {len(data)} of the {num_bytes} bytes of {key!r}")
        return data

    def discard(self, key: Hashable) -> None:
        """Forget a key's value, if there is one."""
        with self._lock:
            _, blocks = self._values.pop(key, (0, []))
            self._free += blocks

    def close(self) -> None:
        """Give the disk's space back, and forget every value; a second time does nothing."""
        with self._lock:
            self._closed = True
            self._values.clear()
            if self._file is not None:
                self._file.close()
                self._file = None

    def _take_blocks(self, number: int) -> list[int]:
        num_new = max(0, number - len(self._free))
        self._free += range(self._num_blocks, self._num_blocks + num_new)
        self._num_blocks += num_new
        blocks, self._free = self._free[:number], self._free[number:]
        return blocks


def _write(descriptor: int, view: memoryview, position: int) -> None:
    """All of it: a disk that is nearly full takes a part first, and says so at the next attempt."""
    while view:
        written = os.pwrite(descriptor, view, position)
        view, position = view[written:], position + written
