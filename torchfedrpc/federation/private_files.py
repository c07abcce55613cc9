"""The folder of a run's outputs: private to its user, and written so that no link leads out of it."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from torchfedrpc.errors import ConfigError

_PRIVATE_FOLDER = 0o700
_PRIVATE_FILE = 0o600
# What Windows has of these is the last alone.
_PRIVATE_FLAGS = sum(getattr(os, name, 0) for name in ("O_NOFOLLOW", "O_CLOEXEC", "O_NONBLOCK", "O_BINARY"))
_HAS_OWNERS = hasattr(os, "geteuid")  # Windows has access lists instead, which a folder inherits


def make_private(path: Path) -> None:
    """Make a folder that its user alone can enter; one that is there has to be such that no other can change it.

    The folder itself may be a link of the user's own.

    Raises:
        ConfigError: it belongs to another user, or others may write into it.
        OSError: it cannot be made.
    """
    path.mkdir(mode=_PRIVATE_FOLDER, parents=True, exist_ok=True)
    if not _HAS_OWNERS:
        return
    status = path.stat()
    if status.st_uid != os.geteuid():
        raise ConfigError(
            f"{path} belongs to another user (uid {status.st_uid}), who could change what a run writes there and "
            f"goes on from: name a folder of your own"
        )
    if status.st_mode & 0o022:
        raise ConfigError(
            f"others may write into {path} (mode {stat.S_IMODE(status.st_mode):04o}), and change what a run writes "
            f"there and goes on from: chmod 700 {path}, or name another folder"
        )


def close_to_others(path: Path) -> None:
    """Take the access of others away from a folder of one's own that another library has made.

    A folder in which the user works is left as it is.
    """
    if not _HAS_OWNERS:
        return
    status = path.stat()
    if status.st_uid == os.geteuid() and status.st_mode & 0o077 and not Path.cwd().is_relative_to(path.resolve()):
        path.chmod(_PRIVATE_FOLDER)


def open_private(path: Path, flags: int) -> int:
    """Open a file for writing, its user's alone; never the file that a link leads to, and never a pipe.

    Args:
        path: the file.
        flags: as of `os.open`.

    Raises:
        OSError: it cannot be opened, or is a link.
    """
    descriptor = os.open(path, flags | _PRIVATE_FLAGS, _PRIVATE_FILE)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(f"{path} is no regular file")
    return descriptor


@contextmanager
def replaced(path: Path) -> Iterator[IO[bytes]]:
    """A file to write, which takes the place of what is at the path once it is whole, a link included.

    Raises:
        OSError: it cannot be written; what is there stays.
    """
    beside = path.with_name(f"{path.name}.tmp")
    beside.unlink(missing_ok=True)
    try:
        with os.fdopen(open_private(beside, os.O_RDWR | os.O_CREAT | os.O_EXCL), "w+b") as file:
            yield file
        os.replace(beside, path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise
