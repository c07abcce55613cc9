"""Checkpoints for tests: what is saved in each round, and damage to the file."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from torchfedrpc.federation.checkpoint_store import Checkpoint, CheckpointStore
from torchfedrpc.storage import BlobStore
from torchfedrpc.wire.packing import pack

CONFIG = {"trainer.lr": 0.1, "trainer.name": "fedavg", "sizes": [1, 2], "none": None}
NUM_BYTES = 500  # of a learner's snapshot, unless said otherwise
Content = tuple[int, dict[str, bytes]]


def learner(client_id: str, round_num: int, num_bytes: int = NUM_BYTES) -> bytes:
    return random.Random(f"{client_id} {round_num}").randbytes(num_bytes)


def learners(round_num: int, *names: str, num_bytes: int = NUM_BYTES) -> dict[str, bytes]:
    return {name: learner(name, round_num, num_bytes) for name in names}


def state_of(round_num: int) -> dict[str, Any]:
    return {"weights": torch.full((20,), float(round_num)), "round": round_num}


def save(
    store: CheckpointStore,
    round_num: int,
    base: Checkpoint | None = None,
    changed: Mapping[str, bytes] | None = None,
) -> Checkpoint:
    files = store.begin(round_num, base)
    try:
        for client_id, data in (changed or {}).items():
            files.add(client_id, data)
        return files.commit(CONFIG, pack(state_of(round_num)))
    except BaseException:
        files.abort()
        raise


def loaded(store: CheckpointStore) -> Checkpoint:
    found = store.load()
    assert found is not None
    return found


def content(checkpoint: Checkpoint) -> Content:
    """Round and learners, the state being that round's."""
    state = checkpoint.read_state()
    assert state["round"] == checkpoint.round_num
    assert torch.equal(state["weights"], torch.full((20,), float(checkpoint.round_num)))
    assert checkpoint.config == CONFIG
    snapshots = dict(checkpoint.snapshots())
    assert snapshots.keys() == checkpoint.digests.keys()
    return checkpoint.round_num, snapshots


def content_in(path: Path) -> Content:
    """Content of the newest whole checkpoint in a folder that no run has."""
    with locked(path) as store:
        return content(loaded(store))


def rounds_in(store: CheckpointStore) -> list[int]:
    return sorted(int(key.split()[1]) for key in keys_in(store) if isinstance(key, str))


def keys_in(store: CheckpointStore) -> list[str | bytes]:
    with contextlib.closing(BlobStore(store.path)) as blobs:
        return list(blobs)


def flip(path: Path, position: int, bit: int = 0) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1 << bit
    path.write_bytes(data)


def flip_blob(path: Path, data: bytes) -> None:
    """Change a bit in the middle of a blob."""
    flip(path, path.read_bytes().index(data) + len(data) // 2)


@contextmanager
def locked(path: Path, num_kept: int = 3) -> Iterator[CheckpointStore]:
    store = CheckpointStore(path, num_kept=num_kept)
    store.lock()
    try:
        yield store
    finally:
        store.unlock()
