"""The head of a checkpoint: a file with the state of a run, which says where the learners' snapshots lie."""

from __future__ import annotations

import hashlib
import os
import re
import struct
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import IO, Any, NamedTuple

from torchfedrpc.errors import SnapshotError
from torchfedrpc.federation.snapshot_pack import Entry
from torchfedrpc.wire.packing import Parcel
from torchfedrpc.wire.serializer import ParameterSerializer, chunks_of

# Layout: magic, version of the format, SHA-256 of all that follows, size of the fields; then the fields and the
# state, each by ParameterSerializer. The fields have for each client its entry, with a number instead of the pack.
_MAGIC = b"TFRCKPT\x00"
_VERSION = 1
_START = struct.Struct("<8sI32sQ")
_NUM_UNSUMMED = 8 + 4 + 32
_PLACE = struct.Struct("<IQQ32s")

PACK_NAME = re.compile(r"round_[0-9]{6,}(-[0-9]+)?\.learners")
"""What a pack is called; a head that names anything else as one is refused."""


class Head(NamedTuple):
    """What a head says, but for the state.

    Attributes:
        round_num: rounds that were done.
        config: plain values by dotted key.
        entries: client id -> where its learner's snapshot lies.
    """

    round_num: int
    config: dict[str, Any]
    entries: Mapping[str, Entry]


def name_of(round_num: int) -> str:
    """What the head of so many rounds is called."""
    return f"round_{round_num:06d}.checkpoint"


def encode(head: Head, state: Parcel) -> list[bytes | memoryview]:
    """The content of the file, in pieces.

    Raises:
        SerializationError: the configuration cannot be pickled, or would be refused when it is read.
    """
    ParameterSerializer.deserialize(ParameterSerializer.serialize(head.config))
    entries = head.entries.values()
    numbers = {pack: number for number, pack in enumerate(sorted({entry.pack for entry in entries}))}
    places = (_PLACE.pack(numbers[entry.pack], entry.offset, entry.num_bytes, entry.digest) for entry in entries)
    fields = ParameterSerializer.serialize(
        {
            "round_num": head.round_num,
            "config": head.config,
            "client_ids": list(head.entries),
            "packs": list(numbers),
            "places": b"".join(places),
        }
    )
    body = [fields, *chunks_of(state)]
    digest = hashlib.sha256(_START.pack(_MAGIC, _VERSION, b"", len(fields))[_NUM_UNSUMMED:])
    for piece in body:
        digest.update(piece)
    return [_START.pack(_MAGIC, _VERSION, digest.digest(), len(fields)), *body]


def check(path: Path) -> None:
    """Read all of a head, in little memory.

    Raises:
        SnapshotError: it is not as it was written, or of another version of the format.
    """
    with path.open("rb") as file:
        expected, digest, _ = _read_start(file, path)
        hashlib.file_digest(file, lambda: digest)
    if digest.digest() != expected:
        raise _damaged(path)


def read_head(path: Path) -> Head:
    """What a head says; its checksum, which covers the state, is left to `check`.

    Raises:
        SnapshotError: it is cut short, of another version of the format, or of something else.
        SerializationError: it is damaged where it was read.
        UntrustedTypeError: it holds what no head does.
    """
    with path.open("rb") as file:
        _, _, fields_bytes = _read_start(file, path)
        fields = ParameterSerializer.deserialize(file.read(fields_bytes))
    head = _head_of(fields)
    if head is None or path.name != name_of(head.round_num):
        raise SnapshotError(f"{path.name} holds something else than the checkpoint of that name")
    return head


def read_state(path: Path, trusted_modules: Iterable[str]) -> Any:
    """The state, after the checksum was compared.

    Raises:
        SnapshotError: the file is not as it was written.
        UntrustedTypeError: the state holds a type outside the allow-list.
        SerializationError: it cannot be read, since classes have changed.
    """
    with path.open("rb") as file:
        expected, digest, fields_bytes = _read_start(file, path)
        rest = memoryview(file.read())
    digest.update(rest)
    if digest.digest() != expected:
        raise _damaged(path)
    return ParameterSerializer.deserialize(rest[fields_bytes:], trusted_modules=trusted_modules)


def _read_start(file: IO[bytes], path: Path) -> tuple[bytes, Any, int]:
    """The checksum that the file says it has, that of what was read so far, and the size of the fields."""
    start = file.read(_START.size)
    if len(start) < _START.size or not start.startswith(_MAGIC):
        raise SnapshotError(f"{path.name} is no checkpoint, or cut short")
    _, version, expected, fields_bytes = _START.unpack(start)
    if version != _VERSION:
        raise SnapshotError(
            f"{path.name} has format {version} and this version of torchfedrpc reads format {_VERSION}: go on with "
            f"the version that wrote it"
        )
    if _START.size + fields_bytes > os.fstat(file.fileno()).st_size:
        raise SnapshotError(f"{path.name} is cut short")
    return expected, hashlib.sha256(start[_NUM_UNSUMMED:]), fields_bytes


def _damaged(path: Path) -> SnapshotError:
    return SnapshotError(f"{path.name} is damaged, its checksum differs")


def _head_of(fields: Any) -> Head | None:
    """The fields as a head: whoever can write a checksum can write anything."""
    match fields:
        case {
            "round_num": int(round_num),
            "config": dict(config),
            "client_ids": list(client_ids),
            "packs": list(packs),
            "places": bytes(places),
        } if (
            all(type(client_id) is str for client_id in client_ids)
            and len(places) == _PLACE.size * len(client_ids)
            and len(client_ids) == len(set(client_ids))
            and all(type(pack) is str and PACK_NAME.fullmatch(pack) for pack in packs)
            and all(place[0] < len(packs) for place in _PLACE.iter_unpack(places))
        ):
            entries = (Entry(packs[number], *place) for number, *place in _PLACE.iter_unpack(places))
            return Head(round_num, config, dict(zip(client_ids, entries, strict=True)))
    return None
