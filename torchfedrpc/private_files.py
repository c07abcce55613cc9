"""Private files and folders: accessible only to their user, and written without following links."""

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
# Windows has only the last one of these flags.
_PRIVATE_FLAGS = sum(getattr(os, name, 0) for name in ("O_NOFOLLOW", "O_CLOEXEC", "O_NONBLOCK", "O_BINARY"))
_HAS_OWNERS = hasattr(os, "geteuid")  # Windows has inherited access lists instead


def make_private(path: Path) -> None:
    """Create a folder with mode 0700, or check that no other user can change an existing one.

    The folder may be a symbolic link.

    Raises:
        ConfigError: If the folder belongs to another user, or others may write into it.
        OSError: If the folder cannot be created.
    """
    path.mkdir(mode=_PRIVATE_FOLDER, parents=True, exist_ok=True)
    if not _HAS_OWNERS:
        return
    status = path.stat()
    if status.st_uid != os.geteuid():
        raise ConfigError(
            f"{path} belongs to another user (uid {status.st_uid}), who could change what a run writes there and "
            f"resumes from: name a folder of your own"
        )
    if status.st_mode & 0o022:
        raise ConfigError(
            f"others may write into {path} (mode {stat.S_IMODE(status.st_mode):04o}), and change what a run writes "
            f"there and resumes from: chmod 700 {path}, or name another folder"
        )


def close_to_others(path: Path) -> None:
    """Set mode 0700 on a folder that another library created, unless it contains the working directory."""
    if not _HAS_OWNERS:
        return
    status = path.stat()
    if status.st_uid == os.geteuid() and status.st_mode & 0o077 and not Path.cwd().is_relative_to(path.resolve()):
        path.chmod(_PRIVATE_FOLDER)


def open_private(path: Path, flags: int) -> int:
    """Open a file with mode 0600 for writing and return its descriptor; links and pipes are refused.

    Args:
        path: The file.
        flags: Flags for `os.open`.

    Raises:
        OSError: If the file cannot be opened, or is a link or a pipe.
    """
    descriptor = os.open(path, flags | _PRIVATE_FLAGS, _PRIVATE_FILE)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(f"{path} is no regular file")
    return descriptor


@contextmanager
def replaced(path: Path) -> Iterator[IO[bytes]]:
    """Write a temporary file, then rename it over the path; a link at the path is replaced.

    Raises:
        OSError: If the file cannot be written; the path keeps its content.
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
