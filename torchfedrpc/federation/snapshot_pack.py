"""Packs: learners' snapshots one after another in a file, which is never changed once it is whole."""

from __future__ import annotations

import hashlib
import itertools
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from torchfedrpc.errors import SnapshotError
from torchfedrpc.federation.private_files import open_private
from torchfedrpc.system import read_at, write_at

_PIECE_BYTES = 1 << 20  # so much of a snapshot is in memory while it is checked or copied


class Entry(NamedTuple):
    """Where a learner's snapshot lies.

    Attributes:
        pack: the name of the pack's file.
        offset: of its first byte in there.
        num_bytes: its size.
        digest: its SHA-256, 32 bytes.
    """

    pack: str
    offset: int
    num_bytes: int
    digest: bytes


class PackWriter:
    """Writes a pack.

    Args:
        path: the file, under the name that it has until it is whole.
        name: the name that it will have then.

    Attributes:
        name: the same.
        num_bytes: written so far.
    """

    def __init__(self, path: Path, name: str) -> None:
        self.name = name
        self.num_bytes = 0
        self._file = os.fdopen(open_private(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL), "wb", buffering=0)

    def add(self, pieces: Iterable[bytes | memoryview]) -> Entry:
        """Append a snapshot that comes in pieces.

        Raises:
            OSError: it cannot be written; the pack is as it was before.
        """
        digest, position = hashlib.sha256(), self.num_bytes
        for piece in pieces:
            digest.update(piece)
            write_at(self._file.fileno(), piece, position)
            position += len(piece)
        entry = Entry(self.name, self.num_bytes, position - self.num_bytes, digest.digest())
        self.num_bytes = position
        return entry

    def finish(self) -> None:
        """Wait until all of it is on the disk, and close it."""
        os.fsync(self._file.fileno())
        self._file.close()

    def close(self) -> None:
        """Close it as it is; a second time does nothing."""
        self._file.close()


def read(folder: Path, entries: Mapping[str, Entry]) -> Iterator[tuple[str, Iterator[bytes]]]:
    """Snapshots in the order in which they lie in their packs.

    Args:
        folder: where the packs are.
        entries: client id -> where its snapshot lies.

    Yields:
        Client id and the snapshot in pieces of 1 MiB at most, to be read before the next is asked for. Reading
        the last piece raises `SnapshotError` where they are not what was written.

    Raises:
        SnapshotError: a pack is missing.
    """
    by_place = sorted(entries.items(), key=lambda item: item[1])
    for pack, group in itertools.groupby(by_place, key=lambda item: item[1].pack):
        try:
            file = (folder / pack).open("rb", buffering=0)
        except FileNotFoundError:
            raise _missing(pack) from None
        with file:
            for client_id, entry in group:
                yield client_id, _pieces(file.fileno(), entry)


def wasteful(folder: Path, entries: Iterable[Entry], new_bytes: int) -> set[str]:
    """The packs whose live snapshots should move into a new one, so that at least half of all bytes are live.

    Without that one live snapshot would keep a whole pack on the disk. Those with the smallest live share go
    first: they give most back for what has to be copied, which is less than what they give back.

    Args:
        folder: where the packs are.
        entries: the snapshots of earlier packs that are live.
        new_bytes: of the new pack so far, all of them live.

    Raises:
        SnapshotError: a pack is missing.
    """
    live_bytes: dict[str, int] = {}
    for entry in entries:
        live_bytes[entry.pack] = live_bytes.get(entry.pack, 0) + entry.num_bytes
    all_bytes = {pack: _size_of(folder, pack) for pack in live_bytes}
    dead_bytes = {pack: all_bytes[pack] - live_bytes[pack] for pack in live_bytes}
    num_live, num_dead = new_bytes + sum(live_bytes.values()), sum(dead_bytes.values())
    moving: set[str] = set()
    for pack in sorted(live_bytes, key=lambda pack: live_bytes[pack] / max(1, all_bytes[pack])):
        if num_dead <= num_live:
            break
        moving.add(pack)
        num_dead -= dead_bytes[pack]
    return moving


def _pieces(descriptor: int, entry: Entry) -> Iterator[bytes]:
    digest, position, end = hashlib.sha256(), entry.offset, entry.offset + entry.num_bytes
    if end > os.fstat(descriptor).st_size:  # the offset need not be a number that the system can take, either
        raise SnapshotError(f"{entry.pack} is cut short before byte {end}")
    while position < end and (piece := read_at(descriptor, min(_PIECE_BYTES, end - position), position)):
        digest.update(piece)
        yield piece
        position += len(piece)
    if digest.digest() != entry.digest:
        raise SnapshotError(f"{entry.pack} is damaged between the bytes {entry.offset} and {end}")


def _size_of(folder: Path, pack: str) -> int:
    try:
        return (folder / pack).stat().st_size
    except FileNotFoundError:
        raise _missing(pack) from None


def _missing(pack: str) -> SnapshotError:
    return SnapshotError(f"{pack} is missing, in which there are learners' snapshots")
