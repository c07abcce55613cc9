"""Checkpoints for tests: what is saved in each round, and what to do to the files."""

from __future__ import annotations

import errno
import os
import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from torchfedrpc.federation.checkpoint_folder import Checkpoint, CheckpointFolder
from torchfedrpc.wire.packing import pack

CONFIG = {"trainer.lr": 0.1, "trainer.name": "fedavg", "sizes": [1, 2], "none": None}
NUM_BYTES = 500  # of a learner's snapshot, unless said otherwise


def learner(client_id: str, round_num: int, num_bytes: int = NUM_BYTES) -> bytes:
    return random.Random(f"{client_id} {round_num}").randbytes(num_bytes)


def learners(round_num: int, *names: str, num_bytes: int = NUM_BYTES) -> dict[str, bytes]:
    return {name: learner(name, round_num, num_bytes) for name in names}


def state_of(round_num: int) -> dict[str, Any]:
    return {"weights": torch.full((20,), float(round_num)), "round": round_num}


def save(
    folder: CheckpointFolder,
    round_num: int,
    base: Checkpoint | None = None,
    changed: Mapping[str, bytes] | None = None,
) -> Checkpoint:
    files = folder.begin(round_num, base)
    try:
        for client_id, data in (changed or {}).items():
            files.add(client_id, data)
        return files.commit(CONFIG, pack(state_of(round_num)))
    except BaseException:
        files.abort()
        raise


def loaded(folder: CheckpointFolder) -> Checkpoint:
    found = folder.load()
    assert found is not None
    return found


def content(checkpoint: Checkpoint) -> tuple[int, dict[str, bytes]]:
    """Round and learners, the state being that round's."""
    state = checkpoint.read_state()
    assert state["round"] == checkpoint.round_num
    assert torch.equal(state["weights"], torch.full((20,), float(checkpoint.round_num)))
    assert checkpoint.config == CONFIG
    snapshots = dict(checkpoint.snapshots())
    assert snapshots.keys() == set(checkpoint.client_ids)
    return checkpoint.round_num, snapshots


def files_in(folder: CheckpointFolder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.path.iterdir() if path.is_file() and path.name != "lock"}


def kinds(folder: CheckpointFolder) -> tuple[list[str], list[str], list[str]]:
    """Names of heads, packs, and all other files."""
    names = sorted(files_in(folder))
    heads = [name for name in names if name.endswith(".checkpoint")]
    packs = [name for name in names if name.endswith(".learners")]
    return heads, packs, [name for name in names if name not in (*heads, *packs)]


def flip(path: Path, position: int, bit: int = 0) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1 << bit
    path.write_bytes(data)


@contextmanager
def locked(path: Path, num_kept: int = 3) -> Iterator[CheckpointFolder]:
    folder = CheckpointFolder(path, num_kept=num_kept)
    folder.lock()
    try:
        yield folder
    finally:
        folder.unlock()


STEPS = ("pwrite", "fsync", "replace", "unlink")


def fail_at(patch: pytest.MonkeyPatch, number: int, lasting: bool) -> list[int]:
    """Let the disk be full at one step, or from then on but for removals; gives how many steps there were."""
    count = [0]

    def failing(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def step(*arguments: Any) -> Any:
            count[0] += 1
            if count[0] == number or (lasting and count[0] > number and name != "unlink"):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return real(*arguments)

        return step

    for name in STEPS:
        patch.setattr(os, name, failing(name, getattr(os, name)))
    return count
