"""Store of a run's checkpoints in one SQLite file, and their verification after a crash or damage.

Snapshots of learners and states of trainers are blobs with their SHA-256 as key, so checkpoints share the snapshots
of unchanged learners. A checkpoint is a head: a blob that lists client ids and digests and begins with the SHA-256 of
the rest.

SQLite makes each save atomic, but has no checksums: a damaged page can affect several checkpoints, or all of them.
`CheckpointStore.load` checks the structure of the file and every byte of the checkpoint that it returns. If the file
is damaged, it returns an older checkpoint, or raises. A damaged file is not modified: the next save writes a new file
with all learners, and renames it over the damaged one.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import itertools
import logging
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torchfedrpc.errors import ConfigError, SerializationError, SnapshotError, UntrustedTypeError
from torchfedrpc.private_files import make_private
from torchfedrpc.storage import BlobStore, FileLock
from torchfedrpc.wire.packing import Parcel
from torchfedrpc.wire.serializer import ParameterSerializer, chunks_of

logger = logging.getLogger(__name__)

_FILE = "checkpoints.sqlite"
_LOCK = "lock"
_HEAD = "round "
_DIGEST_BYTES = 32


def is_in_use(folder: Path) -> bool:
    """Return whether a run has locked a folder of checkpoints, which need not exist."""
    if not (folder / _LOCK).exists():
        return False
    try:
        FileLock(folder / _LOCK).release()
    except OSError:
        return True
    return False


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """Complete checkpoint.

    Attributes:
        store: The store that contains it.
        round_num: Number of rounds done, which is also the number of the next round.
        config: Settings by dotted key that must be equal in a run that resumes.
        digests: Client id -> SHA-256 of the learner's snapshot.
        state: SHA-256 of the trainer's state.
        is_in_damaged_file: Whether other parts of the file are damaged.
    """

    store: CheckpointStore = field(repr=False)
    round_num: int
    config: dict[str, Any] = field(repr=False)
    digests: Mapping[str, bytes] = field(repr=False)
    state: bytes = field(repr=False)
    is_in_damaged_file: bool = False

    def read_state(self, trusted_modules: Iterable[str] = ()) -> Any:
        """Read the state that `Save.commit` stored.

        Args:
            trusted_modules: Top-level packages with classes allowed in the state, beside plain data.

        Raises:
            UntrustedTypeError: If the state has a type outside the allow-list.
            SerializationError: If the state cannot be read because classes have changed.
            SnapshotError: If the file has been damaged since it was verified.
            OSError: If the file cannot be read.
        """
        data = self.store.read(self.state, "the trainer's state")
        return ParameterSerializer.deserialize(data, trusted_modules=trusted_modules)

    def snapshots(self) -> Iterator[tuple[str, bytes]]:
        """Yield client ids and snapshots one by one.

        Raises:
            SnapshotError: If the file has been damaged since it was verified.
            OSError: If the file cannot be read.
        """
        for client_id, digest in self.digests.items():
            yield client_id, self.store.read(digest, f"the snapshot of {client_id!r}")


class CheckpointStore:
    """Folder with the checkpoints of one run. Not thread-safe: one thread uses it at a time.

    Args:
        folder: The folder.
        num_kept: Number of newest checkpoints to keep.
    """

    def __init__(self, folder: Path, *, num_kept: int = 3) -> None:
        self.folder = folder
        self.path = folder / _FILE
        self._new_path = folder / f"{_FILE}.tmp"
        self._num_kept = num_kept
        self._lock: FileLock | None = None
        self._blobs: BlobStore | None = None  # None if there is no file

    @property
    def blobs(self) -> BlobStore:
        """The open file."""
        if self._blobs is None:
            raise ConfigError(f"{self.path} is not open: call lock() and load() first")
        return self._blobs

    @property
    def is_used(self) -> bool:
        """Whether a run has locked the folder before this one."""
        return self._lock is not None and not self._lock.is_new

    def lock(self) -> None:
        """Create the folder, lock it for this process, and remove an incomplete file.

        Raises:
            ConfigError: If another run uses the folder, or the folder cannot be created or written.
        """
        try:
            make_private(self.folder)
            self._lock = FileLock(self.folder / _LOCK)
            _remove(self._new_path)
        except BlockingIOError as error:
            raise ConfigError(
                f"the checkpoints in {self.folder} belong to a run that goes on ({error.strerror}): wait for its "
                f"end, or give this run a folder of its own"
            ) from None
        except OSError as error:
            self.unlock()
            raise ConfigError(f"{self.folder} cannot hold checkpoints: {error}; name another folder") from error

    def unlock(self) -> None:
        """Close the file and release the folder. A second call does nothing."""
        if self._blobs is not None:
            self._blobs.close()
        if self._lock is not None:
            self._lock.release()
        self._blobs = self._lock = None

    def load(self) -> Checkpoint | None:
        """Open the file, verify checkpoints from the newest to the oldest, and return the first intact one.

        Returns:
            The newest intact checkpoint, with a warning if the file is damaged; None if there is no file.

        Raises:
            SnapshotError: If no checkpoint is intact, or the file has the format of another version.
            UntrustedTypeError: If a head has a type outside the allow-list.
            OSError: If the file cannot be read, for another reason than a bad disk.
        """
        if not os.path.lexists(self.path):
            return None
        damage: list[str] = []
        with _noted(damage):
            self._blobs = self._blobs or BlobStore(self.path)
            with _noted(damage):
                self._blobs.check()
            for round_num in sorted(self._rounds(), reverse=True):
                with _noted(damage):
                    found = self._read_head(round_num)
                    self.read(found.state, "the trainer's state")
                    for _ in found.snapshots():
                        pass
                    if damage:
                        text = "; ".join(damage)
                        logger.warning("%s is damaged, and round %d is used: %s", self.path, round_num, text)
                    return replace(found, is_in_damaged_file=bool(damage))
        raise SnapshotError(
            f"no checkpoint in {self.path} is whole: {'; '.join(damage) or 'it has none'}. Restore the file from a "
            f"backup, or begin anew with resume=never"
        )

    def begin(self, round_num: int, base: Checkpoint | None) -> Save:
        """Begin to write a checkpoint: into the file of its base, or into a new file if that is not this store's.

        Args:
            round_num: Number of rounds done.
            base: The last checkpoint that this run has written or loaded. It provides the snapshots of learners that
                are neither added nor left out. None if all learners are added; the new file then contains only this
                checkpoint.

        Raises:
            OSError: If the file cannot be written.
            SnapshotError: If the file is damaged.
        """
        if base is not None and base.store is self and self._blobs is not None and not base.is_in_damaged_file:
            return Save(self, self._blobs, round_num, base)
        _remove(self._new_path)
        return Save(self, BlobStore(self._new_path), round_num, base, makes_file=True)

    def set_aside(self) -> Path | None:
        """Move the file into a new folder, for a run that starts at its first round.

        Returns:
            The new folder; None if there is no file.

        Raises:
            OSError: If the file cannot be moved.
        """
        if not os.path.lexists(self.path):
            return None
        with contextlib.suppress(SnapshotError, OSError):
            BlobStore(self.path).close()  # rolls back an incomplete transaction, since the journal is not moved
        folders = (self.folder / f"earlier_{number}" for number in itertools.count(1))
        aside = next(folder for folder in folders if not folder.exists())
        aside.mkdir(mode=0o700)
        os.replace(self.path, aside / _FILE)
        return aside

    def read(self, digest: bytes, what: str) -> bytes:
        """Return a blob after comparing its checksum; ``what`` names it in errors."""
        with contextlib.suppress(KeyError):
            data = self.blobs.get(digest)
            if hashlib.sha256(data).digest() == digest:
                return data
        raise SnapshotError(f"{what} is damaged or missing")

    def _rounds(self) -> list[int]:
        keys = (key.removeprefix(_HEAD) for key in self.blobs if isinstance(key, str))
        return [int(key) for key in keys if key.isdecimal()]

    def _read_head(self, round_num: int) -> Checkpoint:
        data = self.blobs.get(f"{_HEAD}{round_num}")
        if hashlib.sha256(data[_DIGEST_BYTES:]).digest() != data[:_DIGEST_BYTES]:
            raise SnapshotError(f"the head of round {round_num} is damaged")
        # The checksum detects damage; the following checks detect files written by another program.
        match ParameterSerializer.deserialize(data[_DIGEST_BYTES:]):
            case {"round_num": int(found), "config": dict(config), "digests": dict(digests), "state": bytes(state)}:
                is_valid = all(type(key) is str and type(value) is bytes for key, value in digests.items())
                if found == round_num and is_valid:
                    return Checkpoint(self, round_num, config, digests, state)
        raise SnapshotError(f"the head of round {round_num} holds something else")

    def _prune(self, newest: Checkpoint, base: Checkpoint) -> None:
        """Delete blobs that neither the newest checkpoint nor the kept ones before it need, from the base backwards.

        Checkpoints after the base belong to a run that this one does not continue.
        """
        older = sorted((number for number in self._rounds() if number <= base.round_num), reverse=True)
        kept: set[str | bytes] = set()
        for checkpoint in [newest, *map(self._read_head, older[: self._num_kept - 1])]:
            kept |= {f"{_HEAD}{checkpoint.round_num}", checkpoint.state, *checkpoint.digests.values()}
        self.blobs.begin()
        try:
            for key in set(self.blobs) - kept:
                self.blobs.discard(key)
            self.blobs.commit()
        except BaseException:
            self.blobs.rollback()
            raise

    def _take_new_file(self) -> None:
        """Rename the new file, complete and closed, over the present one."""
        if self._blobs is not None:
            self._blobs.close()
        try:
            self.path.with_name(f"{_FILE}-journal").unlink(missing_ok=True)  # SQLite would apply it to the new file
            os.replace(self._new_path, self.path)
        finally:
            self._blobs = BlobStore(self.path) if os.path.lexists(self.path) else None


class Save:
    """Checkpoint being written, in one transaction that ends with `commit` or `abort`."""

    def __init__(
        self,
        store: CheckpointStore,
        blobs: BlobStore,
        round_num: int,
        base: Checkpoint | None,
        *,
        makes_file: bool = False,
    ) -> None:
        self._store = store
        self._blobs = blobs
        self._round_num = round_num
        self._base = base
        self._makes_file = makes_file
        self._digests = dict(base.digests) if base is not None else {}
        self._written = set() if makes_file else set(self._digests.values())
        blobs.rollback()  # of a save cancelled at its beginning
        blobs.begin()

    def add(self, client_id: str, data: bytes) -> None:
        """Write the snapshot of a learner that has changed since the base.

        Raises:
            OSError: If the snapshot cannot be written; `abort` has to follow.
            SnapshotError: If the file is damaged.
        """
        self._digests[client_id] = self._put([data])

    def leave_out(self, client_id: str) -> None:
        """Leave out a learner that the base has."""
        self._digests.pop(client_id, None)

    def commit(self, config: Mapping[str, Any], state: Parcel) -> Checkpoint:
        """Complete the checkpoint, and delete checkpoints that are no longer kept.

        Args:
            config: Plain values by dotted key.
            state: The trainer's state, from `pack`.

        Returns:
            The checkpoint, which is the base of the next one.

        Raises:
            SnapshotError: If the file is damaged, or the file of the base.
            SerializationError: If the configuration contains other than plain values.
            OSError: If the file cannot be written; `abort` has to follow.
        """
        found = Checkpoint(self._store, self._round_num, dict(config), self._digests, self._put(chunks_of(state)))
        names = ("round_num", "config", "digests", "state")
        body = ParameterSerializer.serialize({name: getattr(found, name) for name in names})
        ParameterSerializer.deserialize(body)  # refuses now what could not be read later
        for client_id, digest in self._digests.items():
            if digest not in self._written:
                assert self._base is not None
                self._put([self._base.store.read(digest, f"the snapshot of {client_id!r}")])
        self._blobs.put(f"{_HEAD}{self._round_num}", [hashlib.sha256(body).digest(), body])
        self._blobs.commit()
        if self._makes_file:
            self._blobs.close()
            self._store._take_new_file()
            self._makes_file = False
            return found
        assert self._base is not None
        try:
            self._store._prune(found, self._base)
        except (OSError, SnapshotError, SerializationError) as error:
            logger.warning("%s keeps checkpoints that are no longer needed: %s", self._store.path, error)
            return replace(found, is_in_damaged_file=not isinstance(error, OSError))
        return found

    def abort(self) -> None:
        """Undo all writes unless they were committed. A second call does nothing."""
        if self._makes_file:
            self._blobs.close()
            _remove(self._store._new_path)
        else:
            self._blobs.rollback()

    def _put(self, pieces: Sequence[bytes | memoryview]) -> bytes:
        """Write a blob unless this checkpoint or its base has it, and return its digest."""
        found = hashlib.sha256()
        for piece in pieces:
            found.update(piece)
        if (digest := found.digest()) not in self._written:
            self._blobs.put(digest, pieces)
            self._written.add(digest)
        return digest


@contextmanager
def _noted(damage: list[str]) -> Iterator[None]:
    """Append errors that show damage to a list, instead of raising them."""
    try:
        yield
    except UntrustedTypeError:
        raise
    except (SnapshotError, SerializationError, KeyError) as error:
        damage.append(str(error))
    except OSError as error:
        if error.errno != errno.EIO:
            raise
        damage.append(str(error))


def _remove(path: Path) -> None:
    """Delete an incomplete database."""
    for name in (path.name, f"{path.name}-journal"):
        path.with_name(name).unlink(missing_ok=True)
