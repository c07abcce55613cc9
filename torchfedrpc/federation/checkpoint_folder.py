"""A folder of checkpoints: what a run goes on from whose driver was lost.

A checkpoint of 12 rounds is a head, ``round_000012.checkpoint``, with the run's state. It says where the learners'
snapshots lie: in the pack ``round_000012.learners`` those that changed, in packs of earlier checkpoints the others.
A file gets its name once it is on the disk, a head after its packs; no pack is ever changed, and checksums cover
every byte: so what can be read is whole, and of one round.
"""

from __future__ import annotations

import errno
import itertools
import logging
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torchfedrpc.errors import ConfigError, SerializationError, SnapshotError, UntrustedTypeError
from torchfedrpc.federation.checkpoint_head import PACK_NAME, Head, check, encode, name_of, read_head, read_state
from torchfedrpc.federation.folder_lock import FolderLock
from torchfedrpc.federation.private_files import open_private
from torchfedrpc.federation.snapshot_pack import Entry, PackWriter, read, wasteful
from torchfedrpc.system import write_at
from torchfedrpc.wire.packing import Parcel

logger = logging.getLogger(__name__)

_HEAD_NAME = re.compile(r"round_([0-9]{6}|[1-9][0-9]{6,})\.checkpoint")
_UNFINISHED = ".tmp"


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """A complete checkpoint, which was verified when it was loaded.

    Attributes:
        folder: where its files are.
        round_num: rounds that were done, so the number of the next one.
        config: plain values by dotted key: what must be equal for a run to go on from it.
        entries: client id -> where its learner's snapshot lies.
    """

    folder: Path
    round_num: int
    config: dict[str, Any] = field(repr=False)
    entries: Mapping[str, Entry] = field(repr=False)

    @property
    def client_ids(self) -> list[str]:
        """The clients whose learners' snapshots it has."""
        return list(self.entries)

    def read_state(self, trusted_modules: Iterable[str] = ()) -> Any:
        """What `Save.commit` was given, on memory of its own.

        Args:
            trusted_modules: top-level packages whose classes may be in it, beside plain data.

        Raises:
            UntrustedTypeError: a type outside the allow-list.
            SerializationError: it cannot be read, since classes have changed.
            SnapshotError: the file is no longer what was verified.
            OSError: it cannot be read.
        """
        return read_state(self.folder / name_of(self.round_num), trusted_modules)

    def snapshots(self) -> Iterator[tuple[str, bytes]]:
        """Client id and snapshot, read one by one in the order in which they lie on the disk.

        Raises:
            SnapshotError: the files are no longer what was verified.
            OSError: they cannot be read.
        """
        for client_id, pieces in read(self.folder, self.entries):
            yield client_id, b"".join(pieces)


class CheckpointFolder:
    """The checkpoints of a run; one thread uses it at a time.

    Args:
        path: the folder.
        num_kept: so many of the newest checkpoints stay.

    Raises:
        ConfigError: ``num_kept`` is less than 1.
    """

    def __init__(self, path: Path, *, num_kept: int = 3) -> None:
        if num_kept < 1:
            raise ConfigError(f"{num_kept} checkpoints cannot be kept: keep 1 or more")
        self.path = path
        self._num_kept = num_kept
        self._lock = FolderLock(path)

    def lock(self) -> None:
        """Make the folder, take it for this run, and remove what a crash left half-written.

        Raises:
            ConfigError: another run has it, which is named, or it cannot be made or locked.
            OSError: what was half-written cannot be removed; then the folder is not locked.
        """
        self._lock.acquire()
        try:
            self._remove(name for name in self._names() if name.endswith(_UNFINISHED))
        except BaseException:
            self.unlock()
            raise

    def unlock(self) -> None:
        """Let other runs have the folder; a second time does nothing."""
        self._lock.release()

    @property
    def is_used(self) -> bool:
        """Whether `lock` found that an earlier run had locked the folder."""
        return self._lock.was_used

    def load(self) -> Checkpoint | None:
        """The newest checkpoint that is whole; for each newer one that is not, a warning is logged.

        Returns:
            None where there is no checkpoint at all.

        Raises:
            SnapshotError: there are checkpoints, and none of them is whole.
            UntrustedTypeError: a file names a type that no checkpoint of ours has outside of the state.
            OSError: the folder or a file cannot be read, though it may be whole.
        """
        newest = ""
        for round_num in sorted(self._rounds(), reverse=True):
            path = self.path / name_of(round_num)
            try:
                return _verified(path)
            except UntrustedTypeError:
                raise
            except (SnapshotError, SerializationError) as error:
                reason = str(error)
            except OSError as error:
                if error.errno not in (errno.ENOENT, errno.EIO):
                    raise
                reason = str(error)
            logger.warning("the checkpoint %s is not whole and is passed over: %s", path, reason)
            newest = newest or reason
        if not newest:
            return None
        raise SnapshotError(
            f"no checkpoint in {self.path} is whole; of the newest, {newest}. Restore the files from a backup, or "
            f"begin anew with resume=never"
        )

    def begin(self, round_num: int, base: Checkpoint | None) -> Save:
        """Begin a checkpoint.

        Args:
            round_num: rounds that are done.
            base: the last checkpoint that this run has written or loaded, here or in another folder; learners that
                are neither added nor left out are as they are there.
        """
        return Save(self, round_num, base)

    def set_aside(self) -> Path | None:
        """Move all checkpoints into a folder of their own, for a run that begins anew.

        Returns:
            That folder; None where there were none.

        Raises:
            OSError: one cannot be moved.
        """
        rounds = sorted(self._rounds())
        packs = [name for name in self._names() if PACK_NAME.fullmatch(name)]
        if not rounds:
            self._remove(packs)
            return None
        numbers = itertools.count(1)
        aside = next(path for number in numbers if not (path := self.path / f"earlier_{number}").exists())
        aside.mkdir(mode=0o700)
        for names in (map(name_of, rounds), packs):
            for name in names:
                os.replace(self.path / name, aside / name)
            self._sync()  # no head comes back without its packs
        return aside

    def _prune(self, newest: Checkpoint, base: Checkpoint | None) -> None:
        """Remove what the newest checkpoint, and those before it that are kept, do not need.

        Those after the base are none of these: the run has gone back behind them since they are damaged.
        """
        heads, packs = {newest.round_num}, {entry.pack for entry in newest.entries.values()}
        end = newest.round_num if base is None else min(newest.round_num, base.round_num + 1)
        for round_num in sorted((number for number in self._rounds() if number < end), reverse=True):
            if len(heads) == self._num_kept:
                break
            try:
                head = read_head(self.path / name_of(round_num))
            except (SnapshotError, SerializationError):
                continue  # it goes: which packs it needs cannot be known
            heads.add(round_num)
            packs.update(entry.pack for entry in head.entries.values())
        if surplus := self._rounds() - heads:
            self._remove(map(name_of, surplus))
            self._sync()  # as above
        self._remove(name for name in self._names() if PACK_NAME.fullmatch(name) and name not in packs)

    def _free_pack_name(self, round_num: int) -> str:
        """A name that no pack has: an earlier one of this round may still be needed."""
        stem = f"round_{round_num:06d}"
        names = itertools.chain([f"{stem}.learners"], (f"{stem}-{number}.learners" for number in itertools.count(1)))
        return next(name for name in names if not (self.path / name).exists())

    def _sync(self) -> None:
        """Wait until the names of the files are on the disk."""
        if not hasattr(os, "O_DIRECTORY"):  # Windows opens no folders; its file systems journal names
            return
        descriptor = os.open(self.path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.EBADF):  # of file systems that cannot do it for a folder
                raise
        finally:
            os.close(descriptor)

    def _names(self) -> list[str]:
        try:
            return [name for name in os.listdir(self.path) if name.startswith("round_")]
        except FileNotFoundError:
            return []

    def _rounds(self) -> set[int]:
        return {int(match[1]) for name in self._names() if (match := _HEAD_NAME.fullmatch(name))}

    def _remove(self, names: Iterable[str]) -> None:
        for name in names:
            (self.path / name).unlink(missing_ok=True)


class Save:
    """A checkpoint that is being written; what does not end in `commit` ends in `abort`."""

    def __init__(self, folder: CheckpointFolder, round_num: int, base: Checkpoint | None) -> None:
        self._folder = folder
        self._round_num = round_num
        self._base = base
        self._added: dict[str, Entry] = {}
        self._left_out: set[str] = set()
        self._pack: PackWriter | None = None
        self._files: list[Path] = []  # what `abort` has to remove, from the last

    def add(self, client_id: str, data: bytes) -> None:
        """Write a learner's snapshot, which the base does not have or which has changed since.

        Raises:
            OSError: it cannot be written.
        """
        self._added[client_id] = self._append([data])

    def leave_out(self, client_id: str) -> None:
        """Do not take over what the base has of a learner."""
        self._left_out.add(client_id)

    def commit(self, config: Mapping[str, Any], state: Parcel) -> Checkpoint:
        """Make it a checkpoint, and remove those that are no longer kept.

        Args:
            config: plain values by dotted key.
            state: whatever the run needs to go on, as `pack` made it.

        Returns:
            The checkpoint, the base of the next one.

        Raises:
            SnapshotError: learners' snapshots that it takes over from its base are damaged or missing.
            SerializationError: the configuration holds what is not plain.
            OSError: it cannot be written.
        """
        head = Head(self._round_num, dict(config), self._taken_over() | self._added)
        content = encode(head, state)
        if self._pack is not None:
            self._pack.finish()
            self._give_name(self._pack.name)
        self._write_head(content)
        self._give_name(name_of(self._round_num))
        self._files.clear()
        checkpoint = Checkpoint(self._folder.path, *head)
        try:
            self._folder._prune(checkpoint, self._base)
        except OSError as error:
            logger.warning("in %s files stay that are no longer needed: %s", self._folder.path, error)
        return checkpoint

    def abort(self) -> None:
        """Remove what was written, unless it was committed; a second time does nothing."""
        if self._pack is not None:
            self._pack.close()
        while self._files:
            path = self._files.pop()
            try:
                path.unlink(missing_ok=True)
            except OSError as error:
                logger.warning("%s stays, though it is not needed: %s", path, error)

    def _append(self, pieces: Iterable[bytes]) -> Entry:
        if self._pack is None:
            name = self._folder._free_pack_name(self._round_num)
            self._pack = PackWriter(self._begin_file(name), name)
        return self._pack.add(pieces)

    def _taken_over(self) -> dict[str, Entry]:
        """The base's snapshots of the other learners; those that cannot stay where they are are copied."""
        if self._base is None:
            return {}
        folder = self._base.folder
        done = self._added.keys() | self._left_out
        entries = {name: entry for name, entry in self._base.entries.items() if name not in done}
        try:
            if folder.resolve() == self._folder.path.resolve():
                new_bytes = sum(entry.num_bytes for entry in self._added.values())
                moving = wasteful(folder, entries.values(), new_bytes)
            else:
                moving = {entry.pack for entry in entries.values()}
            to_copy = {name: entry for name, entry in entries.items() if entry.pack in moving}
            for client_id, pieces in read(folder, to_copy):
                entries[client_id] = self._append(pieces)
        except SnapshotError as error:
            raise SnapshotError(
                f"the learners of the last checkpoint, in {folder}, cannot be taken over: {error}. Resume the run: "
                f"it goes on from the last checkpoint that is whole"
            ) from error
        return entries

    def _begin_file(self, name: str) -> Path:
        path = self._folder.path / f"{name}{_UNFINISHED}"
        path.unlink(missing_ok=True)  # of a save that was cut off, or a link that another has put there
        self._files.append(path)
        return path

    def _write_head(self, content: Iterable[bytes | memoryview]) -> None:
        position = 0
        path = self._begin_file(name_of(self._round_num))
        descriptor = open_private(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
        try:
            for piece in content:
                write_at(descriptor, piece, position)
                position += len(piece)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def _give_name(self, name: str) -> None:
        """Name the file that was begun last, which is whole; it keeps the name even if the machine crashes."""
        path = self._folder.path / name
        os.replace(self._files[-1], path)
        self._files[-1] = path
        self._folder._sync()


def _verified(path: Path) -> Checkpoint:
    """The checkpoint of a head, once all of that and all its snapshots were read."""
    check(path)
    head = read_head(path)
    for _, pieces in read(path.parent, head.entries):
        for _ in pieces:
            pass
    return Checkpoint(path.parent, *head)
