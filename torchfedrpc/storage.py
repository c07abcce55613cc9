"""Store of blobs in one SQLite file, and a file lock; used for checkpoints and evicted learners."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import sqlite3
import stat
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torchfedrpc.errors import SnapshotError
from torchfedrpc.private_files import open_private, replaced

Key = str | bytes
Piece = bytes | bytearray | memoryview

_APPLICATION_ID = 0x54465243  # "TFRC"
_FORMAT = 1
_CHUNK_BYTES = 1 << 20  # SQLite limits a value to 1 GB, and copies it as a whole
_PAGE_BYTES = 1 << 14  # 1,000 blobs of 200 kB: 0.33 s to write and 0.14 s to read; with 4 KiB pages 0.46 s and 0.24 s
_BUSY_S = 5.0  # wait for a user's SQLite tool that reads the file
_SYSTEM_ERRORS = {
    sqlite3.SQLITE_FULL: errno.ENOSPC,
    sqlite3.SQLITE_IOERR: errno.EIO,
    sqlite3.SQLITE_NOLFS: errno.EFBIG,
    sqlite3.SQLITE_CANTOPEN: errno.EACCES,
    sqlite3.SQLITE_PERM: errno.EACCES,
    sqlite3.SQLITE_READONLY: errno.EROFS,
    sqlite3.SQLITE_BUSY: errno.EAGAIN,
}


class BlobStore:
    """Store of blobs by key in one SQLite database.

    A blob is stored in rows of at most 1 MiB. Pages of deleted blobs are reused, so the file does not grow beyond the
    largest amount stored at one time, counting a replaced blob beside its successor. Methods may be called from any
    thread; a transaction from `begin` to `commit` belongs to one thread.

    After SIGKILL or power loss a named file contains the last committed transaction (rollback journal,
    ``synchronous=FULL``). SQLite does not checksum content, so readers of a named file compare checksums of their
    own.

    Args:
        path: The database file; it is created with mode 0600 if it does not exist. None: A temporary file without a
            name in ``TMPDIR`` (default ``/var/tmp``). The system frees its space when the process ends.

    Raises:
        SnapshotError: If the file is damaged, is not a store, or has the format of another version.
        OSError: If the file cannot be opened, or is a link.
    """

    def __init__(self, path: Path | None = None) -> None:
        self._lock = threading.RLock()
        self._name = str(path or "the temporary store")
        self._pid = os.getpid()
        is_new = path is None or _make_private_file(path)
        self._connection = _connect(path, timeout_s=_BUSY_S)
        try:
            self._configure(is_temporary=path is None)
            if is_new:
                self._make_table()
            self._check_format()
        except BaseException:
            self._connection.close()
            raise

    def put(self, key: Key, pieces: Iterable[Piece]) -> None:
        """Store a blob, given in pieces, and replace the key's present blob.

        Raises:
            OSError: If the disk is full or cannot be written. The present blob is kept; inside a transaction,
                `rollback` has to follow.
            SnapshotError: If the file is damaged.
            ValueError: If the store is closed.
        """
        with self._lock, _translated_errors(self._name):
            if self._connection.in_transaction:
                self._replace(key, pieces)
                return
            self.begin()
            try:
                self._replace(key, pieces)
                self.commit()
            except BaseException:
                self.rollback()
                raise

    def get(self, key: Key) -> bytes:
        """Return a blob.

        Raises:
            KeyError: If there is no such blob.
            SnapshotError: If the file is damaged.
            OSError: If the disk cannot be read.
            ValueError: If the store is closed.
        """
        chunks = [data for (data,) in self._execute("SELECT data FROM chunks WHERE key = ? ORDER BY number", key)]
        if not chunks:
            raise KeyError(key)
        if not all(type(data) is bytes for data in chunks):
            raise SnapshotError(f"{self._name} is damaged: it has a blob of another type")
        return b"".join(chunks)

    def __iter__(self) -> Iterator[Key]:
        """Iterate over the keys of all blobs."""
        return iter([key for (key,) in self._execute("SELECT DISTINCT key FROM chunks")])

    def discard(self, key: Key) -> None:
        """Delete a blob if it exists. On a closed store this does nothing."""
        with contextlib.suppress(ValueError):
            self._execute("DELETE FROM chunks WHERE key = ?", key)

    def begin(self) -> None:
        """Begin a transaction; `commit` or `rollback` ends it."""
        self._execute("BEGIN IMMEDIATE")

    def commit(self) -> None:
        """Write all changes since `begin` to the disk.

        Raises:
            OSError: If the disk is full or cannot be written; `rollback` has to follow.
        """
        self._execute("COMMIT")

    def rollback(self) -> None:
        """Undo all changes since `begin`. After an error SQLite may have done so already."""
        with self._lock, _translated_errors(self._name):
            if self._connection.in_transaction:
                self._connection.execute("ROLLBACK")

    def check(self) -> None:
        """Check the structure of the whole file, but not the content of blobs.

        Raises:
            SnapshotError: If the file is damaged, or cannot be written; a damaged header may cause that as well.
            OSError: If the disk cannot be read.
        """
        ((found,),) = self._execute("PRAGMA integrity_check(1)")
        if found != "ok":
            raise SnapshotError(f"{self._name} is damaged: {' '.join(str(found).split())}")
        self.begin()
        try:
            self._execute(f"PRAGMA user_version = {_FORMAT}")
        except OSError as error:
            raise SnapshotError(f"{self._name} cannot be written: {error}") from error
        finally:
            self.rollback()

    def close(self) -> None:
        """Close the file; a second call does nothing. A forked child does not close it: the parent may be writing."""
        with self._lock:
            if os.getpid() == self._pid:
                self._connection.close()

    def _configure(self, *, is_temporary: bool) -> None:
        self._execute(f"PRAGMA page_size = {_PAGE_BYTES}")
        self._execute("PRAGMA secure_delete = OFF")  # some builds overwrite deleted content by default
        self._execute(f"PRAGMA journal_mode = {'MEMORY' if is_temporary else 'DELETE'}")
        self._execute(f"PRAGMA synchronous = {'OFF' if is_temporary else 'FULL'}")
        # Hardening against files written or damaged by others, see sqlite.org/security.html.
        self._execute("PRAGMA trusted_schema = OFF")
        self._execute("PRAGMA cell_size_check = ON")

    def _make_table(self) -> None:
        self.begin()
        self._execute("CREATE TABLE chunks (key NOT NULL, number INTEGER, data BLOB, PRIMARY KEY (key, number))")
        self._execute(f"PRAGMA application_id = {_APPLICATION_ID}")
        self._execute(f"PRAGMA user_version = {_FORMAT}")
        self.commit()

    def _check_format(self) -> None:
        if self._execute("PRAGMA application_id") != [(_APPLICATION_ID,)]:
            raise SnapshotError(f"{self._name} is damaged, or no store of torchfedrpc")
        ((found,),) = self._execute("PRAGMA user_version")
        if found != _FORMAT:
            raise SnapshotError(
                f"{self._name} has format {found} and this version of torchfedrpc reads format {_FORMAT}: use the "
                f"version that wrote it"
            )

    def _replace(self, key: Key, pieces: Iterable[Piece]) -> None:
        """Insert the new rows, then delete the old ones: reused pages have to be journalled, new pages do not."""
        ((first,),) = self._execute("SELECT ifnull(max(number) + 1, 0) FROM chunks WHERE key = ?", key)
        number = first
        for piece in pieces:
            view = memoryview(piece).cast("B")
            for start in range(0, len(view), _CHUNK_BYTES):
                self._execute("INSERT INTO chunks VALUES (?, ?, ?)", key, number, view[start : start + _CHUNK_BYTES])
                number += 1
        if number == first:
            self._execute("INSERT INTO chunks VALUES (?, ?, ?)", key, number, b"")
        self._execute("DELETE FROM chunks WHERE key = ? AND number < ?", key, first)

    def _execute(self, statement: str, *values: object) -> list[Any]:
        with self._lock, _translated_errors(self._name):
            return self._connection.execute(statement, values).fetchall()


class FileLock:
    """Exclusive lock held by one live process: an open transaction on an empty SQLite file.

    The system releases the lock when the process ends, for any reason. A forked child does not hold it. A file with
    the suffix ``.owner`` names the process.

    Args:
        path: The lock file.

    Attributes:
        is_new: Whether this call created the lock file.

    Raises:
        BlockingIOError: If this or another process has the lock; ``strerror`` names the process.
        OSError: If the file cannot be opened, or is a link.
    """

    def __init__(self, path: Path) -> None:
        self._pid = os.getpid()
        self.is_new = _make_private_file(path)
        self._connection = _connect(path, timeout_s=0.0)
        owner = path.with_suffix(".owner")
        try:
            with _translated_errors(str(path)):
                self._connection.execute("PRAGMA journal_mode = MEMORY")
                self._connection.execute("BEGIN EXCLUSIVE")
            with replaced(owner) as file:
                file.write(f"process {os.getpid()} on {socket.gethostname()}".encode())
        except BlockingIOError:
            self._connection.close()
            name = owner.read_bytes().decode(errors="replace") if owner.exists() else "in another process"
            raise BlockingIOError(errno.EAGAIN, name, str(path)) from None
        except BaseException:
            self._connection.close()
            raise

    def release(self) -> None:
        """Release the lock. A second call does nothing, nor does a call in a forked child."""
        if os.getpid() == self._pid:
            self._connection.close()


def _make_private_file(path: Path) -> bool:
    """Create an empty file with mode 0600 unless it exists, and return whether it was created.

    An existing file is not opened: closing it would release the POSIX locks that this process holds on it.
    """
    try:
        is_regular = stat.S_ISREG(path.lstat().st_mode)
    except FileNotFoundError:
        os.close(open_private(path, os.O_RDWR | os.O_CREAT | os.O_EXCL))
        return True
    if not is_regular:
        raise OSError(errno.ELOOP, "it is a link, or no regular file", str(path))
    return False


def _connect(path: Path | None, *, timeout_s: float) -> sqlite3.Connection:
    with _translated_errors(str(path)):
        name = "" if path is None else os.path.abspath(path)  # an absolute path is never taken for a URI
        return sqlite3.connect(name, timeout=timeout_s, isolation_level=None, check_same_thread=False)


@contextmanager
def _translated_errors(name: str) -> Iterator[None]:
    """Translate SQLite's errors into `OSError`, `SnapshotError` or `ValueError`."""
    try:
        yield
    except sqlite3.ProgrammingError:
        raise ValueError(f"{name} is closed") from None
    except sqlite3.Error as error:
        code = _SYSTEM_ERRORS.get(getattr(error, "sqlite_errorcode", sqlite3.SQLITE_CORRUPT) & 0xFF)
        if code is None:
            raise SnapshotError(f"{name} is damaged: {error}") from error
        raise OSError(code, str(error), name) from error
