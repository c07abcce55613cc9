"""Byte strings on disk under keys: where snapshots wait that are too many for memory."""

from __future__ import annotations

import tempfile
import threading
from collections.abc import Hashable
from typing import IO

from torchfedrpc.system import read_at, write_at

_BLOCK_BYTES = 1 << 12
_Runs = list[tuple[int, int]]  # of blocks that follow each other: number of the first, how many


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
        self._values: dict[Hashable, tuple[int, _Runs]] = {}  # key -> size in bytes, where it lies
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
            runs, start = self._take_blocks(-(-len(view) // _BLOCK_BYTES)), 0
            try:
                for first, number in runs:
                    stop = start + number * _BLOCK_BYTES
                    write_at(self._file.fileno(), view[start:stop], first * _BLOCK_BYTES)
                    start = stop
            except BaseException:
                self._free_blocks(runs)
                raise
            _, replaced = self._values.get(key, (0, []))
            self._values[key] = (len(view), runs)
            self._free_blocks(replaced)

    def get(self, key: Hashable) -> bytes:
        """The value of a key.

        Raises:
            KeyError: there is none.
            OSError: the disk cannot be read.
        """
        with self._lock:
            num_bytes, runs = self._values[key]
            assert self._file is not None
            descriptor, left, chunks = self._file.fileno(), num_bytes, []
            for first, number in runs:
                chunks.append(_read(descriptor, min(number * _BLOCK_BYTES, left), first * _BLOCK_BYTES))
                left -= number * _BLOCK_BYTES
        data = b"".join(chunks)
        if len(data) != num_bytes:
            raise OSError(f"the spool's file gave {len(data)} of the {num_bytes} bytes of {key!r}")
        return data

    def discard(self, key: Hashable) -> None:
        """Forget a key's value, if there is one."""
        with self._lock:
            _, runs = self._values.pop(key, (0, []))
            self._free_blocks(runs)

    def close(self) -> None:
        """Give the disk's space back, and forget every value; a second time does nothing."""
        with self._lock:
            self._closed = True
            self._values.clear()
            if self._file is not None:
                self._file.close()
                self._file = None

    def _take_blocks(self, number: int) -> _Runs:
        num_new = max(0, number - len(self._free))
        taken = self._free[: number - num_new]
        del self._free[: number - num_new]
        runs: _Runs = []
        for block in sorted(taken):
            if runs and sum(runs[-1]) == block:
                runs[-1] = (runs[-1][0], runs[-1][1] + 1)
            else:
                runs.append((block, 1))
        if num_new:
            runs.append((self._num_blocks, num_new))
            self._num_blocks += num_new
        return runs

    def _free_blocks(self, runs: _Runs) -> None:
        for first, number in runs:
            self._free += range(first, first + number)


def _read(descriptor: int, num_bytes: int, position: int) -> bytes:
    """All of it, or as much as the file has: a single read gives no more than 2 GiB."""
    chunks = []
    while num_bytes and (chunk := read_at(descriptor, num_bytes, position)):
        chunks.append(chunk)
        num_bytes, position = num_bytes - len(chunk), position + len(chunk)
    return b"".join(chunks)
