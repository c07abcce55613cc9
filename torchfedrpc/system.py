"""What differs between Linux, macOS and Windows, in one form for all of them."""

from __future__ import annotations

import os


def num_usable_cores() -> int:
    """The cores that this process may use; where the system does not tell, all of the machine's."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def read_at(descriptor: int, num_bytes: int, position: int) -> bytes:
    """Read from a position of a file that no other thread uses now; as `os.pread`, which Windows lacks.

    Raises:
        OSError: it cannot be read.
    """
    if hasattr(os, "pread"):
        return os.pread(descriptor, num_bytes, position)
    os.lseek(descriptor, position, os.SEEK_SET)
    return os.read(descriptor, num_bytes)


def write_at(descriptor: int, data: bytes | memoryview, position: int) -> None:
    """Write all of it: a disk that is nearly full takes a part first, and says so at the next attempt.

    No other thread uses the file now.

    Raises:
        OSError: it cannot be written.
    """
    view = memoryview(data)
    while view:
        if hasattr(os, "pwrite"):
            written = os.pwrite(descriptor, view, position)
        else:  # Windows
            os.lseek(descriptor, position, os.SEEK_SET)
            written = os.write(descriptor, view)
        view, position = view[written:], position + written
