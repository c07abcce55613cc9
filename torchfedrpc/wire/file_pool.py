"""A pool of memory files: writing to pages that exist takes a quarter of the time that the kernel needs for new ones.

A file is written again only if no process can still read its old content: each request that named the file was
answered, so no process will open it by that request, and `has_reader` finds no process that has it open or mapped.
"""

from __future__ import annotations

import mmap
import os
import threading
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from torchfedrpc.wire import memory_file

_MAX_BYTES = 512 << 20  # a snapshot lets the default journal free as much at once: twelve models of 40 MB
_MAX_FILES = 128  # two descriptors each; the files of large objects have 4 MB or more
_MAX_TRIES = 8  # files that have readers, before a new file is made: each try takes 15 µs


@dataclass(eq=False, slots=True)
class MemoryFile:
    """An open memory file.

    Attributes:
        descriptor: The open file.
        num_bytes: Its size.
        pool: The pool that takes it back; None for a file that is written once, or of another process.
        num_requests: Requests that name the file to another process and were not answered.
        mapping: Its memory, if it is mapped for writing.
    """

    descriptor: int
    num_bytes: int
    pool: FilePool | None = None
    num_requests: int = 0
    mapping: mmap.mmap | None = None

    def give_back(self) -> None:
        """Return the file to its pool, or close it."""
        if self.pool is not None:
            self.pool.give_back(self)
        else:
            self.close()

    def write(self, chunks: Iterable[bytes | memoryview]) -> None:
        """Write chunks one behind the other.

        Raises:
            OSError: If there is no memory for them.
        """
        if self.mapping is None:  # faster for new pages
            memory_file.write(self.descriptor, chunks)
            return
        memory, start = np.frombuffer(self.mapping, np.uint8), 0
        for chunk in chunks:
            memory[start : start + len(chunk)] = np.frombuffer(chunk, np.uint8)  # without the GIL
            start += len(chunk)

    def close(self) -> None:
        """Close the file; mappings of other processes stay usable."""
        self.mapping = None
        os.close(self.descriptor)


class FilePool:
    """Memory files of one process that are not in use. Thread-safe.

    A forked child leaves the files to its parent: it makes new ones, and closes those that it gives back.

    Args:
        max_bytes: Size in bytes of the files that it keeps.
    """

    def __init__(self, max_bytes: int = _MAX_BYTES) -> None:
        self._max_bytes = max_bytes
        self._pid = os.getpid()
        self._lock = threading.Lock()
        self._files: list[MemoryFile] = []  # the oldest first
        self._is_open = True

    def file_of(self, chunks: Iterable[bytes | memoryview], num_bytes: int) -> MemoryFile:
        """Return a file of exactly that size with the chunks in it, one behind the other.

        Raises:
            OSError: If there is no memory or descriptor for it.
        """
        file = self._unused(num_bytes) or MemoryFile(memory_file.create(num_bytes), num_bytes, self)
        try:
            file.write(chunks)
        except BaseException:
            file.close()
            raise
        return file

    def give_back(self, file: MemoryFile) -> None:
        """Keep a file, or close it if a request that names it was not answered.

        A garbage collection may call this at any time, in the middle of other methods too: it never waits.
        """
        if file.num_requests or not self._is_usable() or not self._lock.acquire(blocking=False):
            file.close()
            return
        try:
            self._files.append(file)
            while self._files and not self._has_room():
                self._files.pop(0).close()
        finally:
            self._lock.release()

    def close(self) -> None:
        """Close the files, and from now on each file that is given back."""
        self._is_open = False
        if os.getpid() == self._pid:
            with self._lock:
                while self._files:
                    self._files.pop().close()

    def _is_usable(self) -> bool:
        return self._is_open and os.getpid() == self._pid and memory_file.shows_readers()

    def _has_room(self) -> bool:
        num_bytes = sum(file.num_bytes for file in self._files)
        return self._is_open and num_bytes <= self._max_bytes and len(self._files) <= _MAX_FILES

    def _unused(self, num_bytes: int) -> MemoryFile | None:
        if not self._is_usable():
            return None
        with self._lock:
            for file in [file for file in self._files if file.num_bytes == num_bytes][:_MAX_TRIES]:
                self._files.remove(file)
                if not memory_file.has_reader(file.descriptor):
                    file.mapping = file.mapping or memory_file.mapped_for_writing(file.descriptor, num_bytes)
                    return file
                self._files.append(file)  # behind files that were not tried
        return None
