"""System calls on memory files: files without a name, which other processes open by number and map."""

from __future__ import annotations

import errno
import functools
import mmap
import os
import signal
from collections.abc import Iterable

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

NAME = "torchfedrpc-shared"
NO_ROOM = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)
"""Errors that may pass: there is no descriptor or no address space left."""
UNAVAILABLE = (*NO_ROOM, errno.EBUSY, errno.ENOSYS, errno.EPERM, errno.EACCES, errno.ENOENT)
"""Errors after which values are copied: of a full system, of other systems than Linux, and of sandboxes without
memory files. Sealing fails with EBUSY while the kernel moves pages of the file."""


def create(num_bytes: int) -> int:
    """Return the descriptor of a new memory file whose size cannot change.

    Raises:
        OSError: If there is no memory or descriptor for it, or the system has no memory files.
    """
    if not hasattr(os, "memfd_create") or not hasattr(fcntl, "F_ADD_SEALS"):
        raise OSError(errno.ENOSYS, "this system has no memory files that can be sealed, as Linux has")
    descriptor = os.memfd_create(NAME, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(descriptor, num_bytes)
        fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, _size_seals())
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def write(descriptor: int, chunks: Iterable[bytes | memoryview]) -> None:
    """Write chunks one behind the other, from the file's beginning.

    Raises:
        OSError: If there is no memory for them.
    """
    start = 0
    for chunk in chunks:
        rest = memoryview(chunk)
        while rest:
            written = os.pwrite(descriptor, rest, start)
            rest, start = rest[written:], start + written


def forbid_writing(descriptor: int) -> None:
    """Forbid every process to write to the file from now on."""
    fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE)


def has_fixed_size(descriptor: int) -> bool:
    """Return whether the file's size can never change."""
    return fcntl.fcntl(descriptor, fcntl.F_GET_SEALS) & _size_seals() == _size_seals()


def mapped_for_writing(descriptor: int, num_bytes: int) -> mmap.mmap | None:
    """Return a mapping of the file with all its pages; None if there is no address space or descriptor for it."""
    try:
        return mmap.mmap(descriptor, num_bytes, mmap.MAP_SHARED | mmap.MAP_POPULATE)
    except OSError:
        return None


def has_reader(descriptor: int) -> bool:
    """Return whether a process, this one included, has opened the file since `create` and has it open or mapped.

    The kernel grants a write lease only where there is none: it counts the descriptors that were opened for reading,
    and a mapping keeps its descriptor's count. The descriptor of `create` does not count. True where that is unknown.
    """
    try:
        reopened = os.open(f"/proc/self/fd/{descriptor}", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return True
    try:
        # The signal to the holder of a lease as the file is opened: by default SIGIO ends a process, SIGURG does not.
        fcntl.fcntl(reopened, fcntl.F_SETSIG, signal.SIGURG)
        fcntl.fcntl(reopened, fcntl.F_SETLEASE, fcntl.F_WRLCK)
        fcntl.fcntl(reopened, fcntl.F_SETLEASE, fcntl.F_UNLCK)  # a child that is forked meanwhile would keep it
    except OSError:
        return True
    finally:
        os.close(reopened)
    return False


@functools.cache
def shows_readers() -> bool:
    """Return whether `has_reader` works on this system.

    Linux before 5.3 refuses every such lease, and kernels of sandboxes may have no leases.
    """
    try:
        descriptor = create(1)
    except OSError:
        return False
    try:
        if has_reader(descriptor):
            return False
        reader = os.open(f"/proc/self/fd/{descriptor}", os.O_RDONLY | os.O_CLOEXEC)
        try:
            return has_reader(descriptor)
        finally:
            os.close(reader)
    finally:
        os.close(descriptor)


def _size_seals() -> int:
    return fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW
