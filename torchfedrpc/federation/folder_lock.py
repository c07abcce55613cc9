"""A lock by which one run alone has a folder, gone with the run's process however that ends."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import IO

from torchfedrpc.errors import ConfigError
from torchfedrpc.federation.private_files import make_private, open_private

_BEYOND_BYTES = 1 << 20

_held: set[tuple[int, str]] = set()
"""Process and lock file: a second lock of the same process would be granted, and its end would release the first."""


class FolderLock:
    """A POSIX record lock on the file ``lock`` of a folder; on Windows, the lock that it has.

    Of all locks this is the one that a forked child does not have a share in: a worker that outlives its driver
    must not keep the next run from going on. Its weak side is that whoever closes any descriptor of the file, in
    the process that holds it, releases it; so the file is never opened a second time.

    Args:
        folder: the folder; it need not be there yet.

    Attributes:
        was_used: whether an earlier run has locked the folder, once `acquire` has been called.
    """

    def __init__(self, folder: Path) -> None:
        self.was_used = False
        self._folder = folder
        self._file: IO[bytes] | None = None
        self._key = (0, "")

    def acquire(self) -> None:
        """Make the folder and take it.

        Raises:
            ConfigError: another run has it, or it cannot be made or locked.
        """
        key = (os.getpid(), os.path.realpath(self._folder))
        if key in _held:
            raise self._taken("in this process")
        try:
            make_private(self._folder)
            file = self._open()
        except OSError as error:
            raise ConfigError(f"{self._folder} cannot hold checkpoints: {error}; name another folder") from error
        try:
            _lock(file)
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}".encode())
        except (BlockingIOError, PermissionError):  # POSIX leaves open which
            with file:
                raise self._taken(file.read(500).decode(errors="replace")) from None
        except OSError as error:
            file.close()
            raise ConfigError(
                f"{self._folder} cannot be locked: {error}; name a folder on a file system with locks and free space"
            ) from error
        self._file, self._key = file, key
        _held.add(key)

    def release(self) -> None:
        """Let others have the folder; a second time does nothing."""
        if self._file is not None:
            self._file.close()
            self._file = None
            _held.discard(self._key)

    def _open(self) -> IO[bytes]:
        path = self._folder / "lock"
        try:
            descriptor = open_private(path, os.O_RDWR | os.O_CREAT | os.O_EXCL)
            self.was_used = False
        except FileExistsError:
            descriptor = open_private(path, os.O_RDWR)
            self.was_used = True
        return os.fdopen(descriptor, "r+b", buffering=0)

    def _taken(self, holder: str) -> ConfigError:
        return ConfigError(
            f"the checkpoints in {self._folder} belong to a run that goes on ({holder or 'in another process'}): "
            f"wait for its end, or give this run a folder of its own"
        )


def _lock(file: IO[bytes]) -> None:
    """Lock a file for this process alone, without waiting.

    Raises:
        BlockingIOError: another process has it locked; or `PermissionError`.
        OSError: its file system has no locks.
    """
    try:
        import fcntl  # noqa: PLC0415 - Unix alone has it
    except ImportError:
        import msvcrt  # noqa: PLC0415 - Windows alone has it

        file.seek(_BEYOND_BYTES)  # nobody can read what is locked, and who holds the lock is to be read
        try:
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined]
        finally:
            file.seek(0)
    else:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
