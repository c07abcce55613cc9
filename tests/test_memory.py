"""Memory that is written again once nobody needs it, and not before."""

from __future__ import annotations

import gc
import mmap
import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from losses import pseudo

import torchfedrpc as tfr
from torchfedrpc.wire.file import TensorFiles
from torchfedrpc.wire.memory import KeptMemory, Memory
from torchfedrpc.wire.packing import pack

MIB = 1 << 20


@pytest.fixture
def kept() -> Iterator[KeptMemory]:
    kept = KeptMemory(64 * MIB)
    yield kept
    kept.close()


def inode_of(files: TensorFiles) -> int:
    ((_, inode, _, _),) = files.addresses()
    return inode


def files_of(value: float, kept: KeptMemory) -> TensorFiles:
    return TensorFiles.of([torch.full((MIB // 4,), value), torch.full((7,), value)], kept=kept)


def test_what_came_free_is_written_again(kept: KeptMemory) -> None:
    inodes = set()
    for number in range(5):
        files = files_of(number, kept)
        inodes.add(inode_of(files))
        large, small = files.tensors()
        assert (large.sum(), small.sum()) == (number * MIB // 4, number * 7)
        del files, large, small
    assert len(inodes) == 1


def test_what_is_mapped_here_is_not(kept: KeptMemory) -> None:
    files = files_of(1, kept)
    inode, (mine, _) = inode_of(files), files.tensors()
    del files
    other = files_of(2, kept)
    assert inode_of(other) != inode
    assert mine.sum() == MIB // 4
    del mine, _
    assert inode_of(files_of(3, kept)) == inode


READER = """
import mmap, os, sys
reader = os.open(sys.argv[1], os.O_RDONLY)
seen = mmap.mmap(reader, 4, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ)
os.close(reader)
print(flush=True)
sys.stdin.readline()
print(seen[:].hex(), flush=True)
"""


def test_what_another_process_has_mapped_is_not(kept: KeptMemory) -> None:
    files = files_of(1, kept)
    inode, ((descriptor, *_),) = inode_of(files), files.addresses()
    path = f"/proc/{os.getpid()}/fd/{descriptor}"
    with subprocess.Popen(
        [sys.executable, "-c", READER, path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as reader:
        assert reader.stdout is not None
        assert reader.stdin is not None
        reader.stdout.readline()
        del files
        assert inode_of(files_of(2, kept)) != inode
        reader.stdin.write("\n")
        reader.stdin.flush()
        assert reader.stdout.readline() == "01000000\n"
    assert inode_of(files_of(3, kept)) == inode  # before the other one, which is younger


def test_what_was_lent_to_one_out_of_reach_is_not(kept: KeptMemory) -> None:
    files = files_of(1, kept)
    inode = inode_of(files)
    files.keep_for_good()
    del files
    assert inode_of(files_of(2, kept)) != inode


def test_no_more_is_kept_than_is_allowed(kept: KeptMemory) -> None:
    for memory in [Memory(MIB) for _ in range(100)]:
        kept.give_back(memory)
    assert sum("torchfedrpc-shared" in where for where in descriptors()) == 64
    kept.give_back(Memory(60 * MIB))
    kept.give_back(Memory(65 * MIB))
    assert sum("torchfedrpc-shared" in where for where in descriptors()) == 5
    last = files_of(1, kept)
    kept.close()
    del last
    assert not any("torchfedrpc-shared" in where for where in descriptors())


def test_where_the_kernel_does_not_tell_nothing_is_written_again(
    kept: KeptMemory, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*args: Any) -> None:
        raise OSError(22, "Invalid argument")

    monkeypatch.setattr("torchfedrpc.wire.memory.fcntl.fcntl", refused)
    memory = object.__new__(Memory)
    memory.descriptor = os.memfd_create("other")
    assert not memory.is_free()
    os.close(memory.descriptor)


def test_memory_that_cannot_be_mapped_is_written_without(kept: KeptMemory, monkeypatch: pytest.MonkeyPatch) -> None:
    inode = inode_of(files_of(1, kept))
    monkeypatch.setattr(mmap, "MAP_SHARED", 0)  # neither shared nor private, which no kernel maps
    files = files_of(2, kept)
    assert inode_of(files) == inode
    assert files.tensors()[0].sum() == 2 * MIB // 4


def descriptors() -> list[str]:
    gc.collect()
    return [os.readlink(f"/proc/self/fd/{number}") for number in os.listdir("/proc/self/fd") if _is_open(number)]


def _is_open(number: str) -> bool:
    return os.path.lexists(f"/proc/self/fd/{number}")


@pytest.fixture
def few_descriptors() -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(descriptors()) + 250, hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


class Deaf:
    """A learner that keeps nothing."""

    def __init__(self, client_id: str) -> None: ...

    def take(self, weights: Any) -> float:
        return float(weights["layer0"][0])


async def test_the_values_of_many_rounds_need_few_descriptors(few_descriptors: None) -> None:
    async with tfr.LearnerProxy(Deaf, ["a", "b", "c", "d"], runtime=pseudo(journal_max_bytes=64 * MIB)) as proxy:
        weights = {f"layer{number}": torch.zeros(MIB // 32) for number in range(20)}  # 2.5 MB
        for number in range(150):
            weights["layer0"].fill_(number)
            assert set((await proxy.clients().call("take", weights)).values()) == {float(number)}


def test_without_descriptors_a_value_is_kept_in_memory(kept: KeptMemory) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))
    try:
        parcel = pack(torch.ones(MIB), kept=kept)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert parcel.files is None
    assert parcel.slots[0].sum() == MIB
