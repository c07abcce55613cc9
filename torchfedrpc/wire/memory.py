"""Memory behind a file descriptor, which other processes can map; and such memory kept, to be written again."""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import mmap
import os
import signal
import tempfile
import threading
import weakref
from collections.abc import Iterable
from typing import Any

from torch import Tensor

from torchfedrpc.wire.tensors import as_bytes

NAME = "torchfedrpc-shared"
SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW
_MAX_KEPT = 64  # descriptors

_FAILED = ctypes.c_void_p(-1).value

# Not the module mmap's own: that keeps a descriptor open for each mapping.
_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]


def map_file(descriptor: int, num_bytes: int, flags: int) -> Any:
    """A file's first bytes, as a ctypes array that unmaps them when nothing refers to it any more.

    Raises:
        OSError: there is no address space, or there are too many mappings.
    """
    address = _libc.mmap(None, num_bytes, mmap.PROT_READ | mmap.PROT_WRITE, flags, descriptor, 0)
    if address == _FAILED:
        number = ctypes.get_errno()
        raise OSError(number, f"{os.strerror(number)}: {num_bytes} bytes that calls share cannot be mapped")
    array = (ctypes.c_char * num_bytes).from_address(address)
    # Not at exit, when tensors may still be looked at.
    weakref.finalize(array, _libc.munmap, address, num_bytes).atexit = False
    return array


class Memory:
    """So many bytes that this process alone writes, as a file without a name.

    Args:
        num_bytes: its size, which it keeps.
        on_disk: whether it lies in `tempfile`'s folder, and not in memory.

    Attributes:
        descriptor: the file's.
        is_for_good: whether it is never to be written again.

    Raises:
        OSError: there is no room for it.
    """

    def __init__(self, num_bytes: int, *, on_disk: bool = False) -> None:
        self.num_bytes = num_bytes
        self.is_for_good = on_disk
        self._array: Any = None  # mapped to be written again
        if on_disk:
            with tempfile.TemporaryFile() as file:
                self.descriptor = os.dup(file.fileno())
        else:
            self.descriptor = os.memfd_create(NAME, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(self.descriptor, num_bytes)
            if not on_disk:
                fcntl.fcntl(self.descriptor, fcntl.F_ADD_SEALS, SEALS)
        except BaseException:
            self.close()
            raise

    def write(self, tensors: Iterable[tuple[int, Tensor]]) -> None:
        """Put in dense tensors of the CPU's whose strides leave no gaps, each with the place where it begins.

        Raises:
            OSError: there is no room for them.
        """
        for start, tensor in tensors:
            rest = as_bytes(tensor).numpy().data
            if self._array is not None:  # no page is to be found any more, so this is the faster way
                ctypes.memmove(ctypes.addressof(self._array) + start, tensor.data_ptr(), len(rest))
                continue
            while rest:
                written = os.pwrite(self.descriptor, rest, start)
                rest, start = rest[written:], start + written

    def reopened(self) -> int:
        """A descriptor of a reader's own, by which `is_free` knows of it, and of what is mapped by it."""
        return os.open(f"/proc/self/fd/{self.descriptor}", os.O_RDONLY | os.O_CLOEXEC)

    def is_free(self) -> bool:
        """Whether nobody, in whichever process, has opened or mapped it as a reader.

        It is so if the kernel would grant a lease for writing, which it does to the only one who has a file open.
        """
        reader = self.reopened()
        try:
            fcntl.fcntl(reader, fcntl.F_SETSIG, signal.SIGURG)  # if it were opened now; that one's default is nothing
            fcntl.fcntl(reader, fcntl.F_SETLEASE, fcntl.F_WRLCK)
            fcntl.fcntl(reader, fcntl.F_SETLEASE, fcntl.F_UNLCK)
        except OSError:
            return False
        finally:
            os.close(reader)
        return True

    def map_to_write(self) -> None:
        """See that what is written goes to pages that are there already."""
        if self._array is None:
            with contextlib.suppress(OSError):  # then it is written without
                self._array = map_file(self.descriptor, self.num_bytes, mmap.MAP_SHARED | mmap.MAP_POPULATE)

    def close(self) -> None:
        """Close it; whoever has mapped it keeps it."""
        self._array = None
        os.close(self.descriptor)


class KeptMemory:
    """Memory that came free is written again: the kernel takes longer to find fresh pages than to copy into them.

    Thread-safe, and a garbage collection may call `give_back` at any time.

    Args:
        limit_bytes: to be kept at most.
    """

    def __init__(self, limit_bytes: int) -> None:
        self._limit_bytes = limit_bytes
        self._lock = threading.RLock()
        self._kept: list[Memory] = []  # the oldest first
        self._num_bytes = 0
        self._is_open = True

    def take(self, num_bytes: int) -> Memory:
        """Memory of that size, with anything in it.

        Raises:
            OSError: there is no room for it.
        """
        with self._lock:
            for memory in list(self._kept):
                if memory.num_bytes == num_bytes and memory.is_free():
                    self._kept.remove(memory)
                    self._num_bytes -= num_bytes
                    memory.map_to_write()
                    return memory
        return Memory(num_bytes)

    def give_back(self, memory: Memory) -> None:
        """Nobody in this process needs it any more; another one may still have it mapped."""
        with self._lock:
            if not self._is_open or memory.is_for_good or memory.num_bytes > self._limit_bytes:
                memory.close()
                return
            self._kept.append(memory)
            self._num_bytes += memory.num_bytes
            while self._num_bytes > self._limit_bytes or len(self._kept) > _MAX_KEPT:
                self._forget_one()

    def close(self) -> None:
        """Keep nothing any more."""
        with self._lock:
            self._is_open = False
            while self._kept:
                self._forget_one()

    def _forget_one(self) -> None:
        oldest = self._kept.pop(0)
        self._num_bytes -= oldest.num_bytes
        oldest.close()
