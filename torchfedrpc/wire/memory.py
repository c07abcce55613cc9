"""Memory behind a file descriptor, which other processes can map; and such memory kept, to be written again."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import functools
import mmap
import os
import secrets
import signal
import tempfile
import threading
import weakref
from collections import deque
from collections.abc import Iterable
from typing import Any

import numpy as np

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

NAME = "torchfedrpc-shared"
STAMP_BYTES = 8
NO_ROOM = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)  # for another descriptor or mapping: errors that may pass
# Other systems than Linux have no such memory; sandboxes forbid it, or show no /proc. Then values are copied instead.
UNAVAILABLE = (*NO_ROOM, errno.ENOSYS, errno.EPERM, errno.EACCES, errno.ENOENT)
_MAX_KEPT = 64  # descriptors

_FAILED = ctypes.c_void_p(-1).value


@functools.cache
def _libc() -> Any:
    """The C library, whose mmap keeps no descriptor open for each mapping, as that of the module mmap does."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
    libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    return libc


def map_file(descriptor: int, num_bytes: int, flags: int) -> Any:
    """A file's first bytes, as a ctypes array that unmaps them when nothing refers to it any more.

    Raises:
        OSError: there is no address space, or there are too many mappings.
    """
    address = _libc().mmap(None, num_bytes, mmap.PROT_READ | mmap.PROT_WRITE, flags, descriptor, 0)
    if address == _FAILED:
        number = ctypes.get_errno()
        raise OSError(number, f"{os.strerror(number)}: {num_bytes} bytes that calls share cannot be mapped")
    array = (ctypes.c_char * num_bytes).from_address(address)
    # Not at exit, when tensors may still be looked at.
    weakref.finalize(array, _libc().munmap, address, num_bytes).atexit = False
    return array


def stamp_of(descriptor: int, num_bytes: int) -> int:
    """The stamp behind so many bytes of a file of `Memory`, as it is now."""
    return int.from_bytes(os.pread(descriptor, STAMP_BYTES, num_bytes), "little")


def is_sealed(descriptor: int) -> bool:
    """Whether a file of `Memory` keeps its size, so that it does not shrink under those who map it."""
    seals = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW
    return fcntl.fcntl(descriptor, fcntl.F_GET_SEALS) & seals == seals


def _sealable_file() -> int:
    if not hasattr(os, "memfd_create") or not hasattr(fcntl, "F_ADD_SEALS"):
        raise OSError(errno.ENOSYS, "this system has no files in memory whose size can be sealed, as Linux has")
    return os.memfd_create(NAME, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)


class Memory:
    """So many bytes that this process alone writes, as a file without a name.

    A reader opens it anew, and maps it privately. The stamp tells one who has just opened it that it has what was
    meant for it: the writer takes the stamp away before it looks whether anybody has it open.

    Args:
        num_bytes: its size, which it keeps.
        on_disk: whether it lies in `tempfile`'s folder, and not in memory.

    Attributes:
        descriptor: the file's.
        stamp: behind those bytes, once they are written.
        is_used_once: whether it is never to be written again.

    Raises:
        OSError: there is no room for it.
    """

    def __init__(self, num_bytes: int, *, on_disk: bool = False) -> None:
        self.num_bytes = num_bytes
        self.stamp = 0
        self.is_used_once = on_disk
        self._array: Any = None  # mapped to be written again
        if on_disk:
            with tempfile.TemporaryFile() as file:
                self.descriptor = os.dup(file.fileno())
        else:
            self.descriptor = _sealable_file()
        try:
            os.ftruncate(self.descriptor, num_bytes + STAMP_BYTES)
            if not on_disk:
                fcntl.fcntl(self.descriptor, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
        except BaseException:
            self.close()
            raise

    def write(self, contents: Iterable[tuple[int, memoryview]]) -> None:
        """Put in bytes, each piece with the place where it begins.

        Raises:
            OSError: there is no room for them.
        """
        for start, content in contents:
            self._write(start, content)
        self.stamp = secrets.randbits(8 * STAMP_BYTES - 1) + 1
        self._put_stamp(self.stamp)

    def is_free(self) -> bool:
        """Whether nobody, in whichever process, has opened or mapped it; nobody will then, who takes it for valid.

        It is so if the kernel would grant a lease for writing, which it does to the only one who has a file open.

        Raises:
            OSError: the kernel grants no leases on such files.
        """
        self._put_stamp(0)
        reader = self._reopened()
        try:
            fcntl.fcntl(reader, fcntl.F_SETSIG, signal.SIGURG)  # if it were opened now; that one's default is nothing
            fcntl.fcntl(reader, fcntl.F_SETLEASE, fcntl.F_WRLCK)
            fcntl.fcntl(reader, fcntl.F_SETLEASE, fcntl.F_UNLCK)
        except BlockingIOError:
            return False
        finally:
            os.close(reader)
        return True

    def map_to_read(self) -> Any:
        """Its bytes, as `map_file` gives them; as long as they are mapped it is not free.

        Raises:
            OSError: as of `map_file`, or no descriptor is left.
        """
        if self.is_used_once:
            return map_file(self.descriptor, self.num_bytes, mmap.MAP_PRIVATE)
        reader = self._reopened()
        try:
            return map_file(reader, self.num_bytes, mmap.MAP_PRIVATE)
        finally:
            os.close(reader)

    def map_to_write(self) -> None:
        """See that what is written goes to pages that are there already."""
        if self._array is None:
            flags = mmap.MAP_SHARED | mmap.MAP_POPULATE
            with contextlib.suppress(OSError):  # then it is written without
                self._array = map_file(self.descriptor, self.num_bytes + STAMP_BYTES, flags)

    def close(self) -> None:
        """Close it; whoever has mapped it keeps it."""
        self._array = None
        os.close(self.descriptor)

    def _reopened(self) -> int:
        """A reader's descriptor, by which the kernel tells that somebody has it open."""
        return os.open(f"/proc/self/fd/{self.descriptor}", os.O_RDONLY | os.O_CLOEXEC)

    def _put_stamp(self, stamp: int) -> None:
        self._write(self.num_bytes, memoryview(stamp.to_bytes(STAMP_BYTES, "little")))

    def _write(self, start: int, content: memoryview) -> None:
        if self._array is not None:  # no page is to be found any more, so this is the faster way
            source = np.frombuffer(content, dtype=np.uint8)
            ctypes.memmove(ctypes.addressof(self._array) + start, source.ctypes.data, len(content))
            return
        while content:
            written = os.pwrite(self.descriptor, content, start)
            content, start = content[written:], start + written


class KeptMemory:
    """Memory that came free is written again: the kernel takes longer to find fresh pages than to copy into them.

    Thread-safe. A garbage collection may call `give_back` at any time, in the middle of `take` too, and in a child
    that was forked then: so it waits for nothing, and leaves the rest to whoever is at it.

    Args:
        limit_bytes: to be kept at most.
    """

    def __init__(self, limit_bytes: int) -> None:
        self._limit_bytes = limit_bytes
        self._lock = threading.Lock()  # guards what is kept
        self._kept: list[Memory] = []  # the oldest first
        self._num_bytes = 0
        self._returned: deque[Memory] = deque()  # that are still to be put there
        self._is_open = True

    def take(self, num_bytes: int) -> Memory:
        """Memory of that size, with anything in it.

        Raises:
            OSError: there is no room for it.
        """
        with self._lock:
            memory = self._found(num_bytes)
        self._put_away()
        if memory is None:
            return Memory(num_bytes)
        memory.map_to_write()
        return memory

    def give_back(self, memory: Memory) -> None:
        """Nobody in this process needs it any more; another one may still have it mapped."""
        self._returned.append(memory)
        self._put_away()

    def close(self) -> None:
        """Keep nothing any more."""
        self._is_open = False
        with self._lock:
            self._forget(until_bytes=0)
        self._put_away()

    def _found(self, num_bytes: int) -> Memory | None:
        for memory in [one for one in self._kept if one.num_bytes == num_bytes]:
            try:
                is_free = memory.is_free()
            except OSError as error:
                if error.errno not in NO_ROOM:  # here it will never be known
                    self._is_open = False
                    self._forget(until_bytes=0)
                return None
            if is_free:
                self._kept.remove(memory)
                self._num_bytes -= num_bytes
                return memory
        return None

    def _put_away(self) -> None:
        while self._returned and self._lock.acquire(blocking=False):
            try:
                self._put_one_away()
            finally:
                self._lock.release()

    def _put_one_away(self) -> None:
        try:
            memory = self._returned.popleft()
        except IndexError:  # another thread has
            return
        if not self._is_open or memory.is_used_once or memory.num_bytes > self._limit_bytes:
            memory.close()
            return
        self._kept.append(memory)
        self._num_bytes += memory.num_bytes
        self._forget(until_bytes=self._limit_bytes)

    def _forget(self, until_bytes: int) -> None:
        while self._kept and (self._num_bytes > until_bytes or len(self._kept) > _MAX_KEPT):
            oldest = self._kept.pop(0)
            self._num_bytes -= oldest.num_bytes
            oldest.close()
