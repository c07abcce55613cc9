"""Memory that is written again once nobody needs it, and not before."""

from __future__ import annotations

import fcntl
import gc
import mmap
import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from losses import pseudo

import torchfedrpc as tfr
from torchfedrpc.errors import SerializationError
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
    ((_, inode, *_),) = files.addresses()
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
    files.use_once()
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


def test_where_the_kernel_does_not_tell_nothing_is_kept(kept: KeptMemory, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = fcntl.fcntl

    def refused(descriptor: int, what: int, *args: Any) -> Any:
        if what == fcntl.F_SETLEASE:
            raise OSError(22, "Invalid argument")
        return asked(descriptor, what, *args)

    monkeypatch.setattr("torchfedrpc.wire.memory.fcntl.fcntl", refused)
    inode = inode_of(files_of(1, kept))
    other = files_of(2, kept)
    assert inode_of(other) != inode
    del other
    assert not any("torchfedrpc-shared" in where for where in descriptors())


def test_whoever_comes_too_late_is_told(kept: KeptMemory) -> None:
    files = files_of(1, kept)
    addresses = files.addresses()
    del files
    assert inode_of(other := files_of(2, kept)) == addresses[0][1]
    with pytest.raises(SerializationError, match="not there any more"):
        TensorFiles.at(addresses, os.getpid())
    assert TensorFiles.at(other.addresses(), os.getpid()).tensors()[0].sum() == 2 * MIB // 4


def test_a_garbage_collection_may_give_back_at_any_time(kept: KeptMemory) -> None:
    class Circle:
        def __init__(self, files: TensorFiles) -> None:
            self.files, self.circle = files, self

    before, kept._limit_bytes = gc.get_threshold(), 3 * MIB
    gc.set_threshold(3)
    try:
        for number in range(300):
            files = files_of(number, kept)
            assert files.tensors()[0][0] == number
            Circle(files)
            del files
    finally:
        gc.set_threshold(*before)
    gc.collect()
    assert kept._num_bytes <= kept._limit_bytes


def test_threads_may_share_it(kept: KeptMemory) -> None:
    def use(value: int) -> bool:
        return all(float(files_of(value, kept).tensors()[0].sum()) == value * MIB // 4 for _ in range(50))

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(use, range(4)))


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


@pytest.mark.parametrize("num_left", [0, 1])
def test_without_descriptors_a_value_is_kept_in_memory(kept: KeptMemory, num_left: int) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    first_free = os.dup(0)
    os.close(first_free)
    resource.setrlimit(resource.RLIMIT_NOFILE, (first_free + num_left, hard))
    try:
        parcel = pack(torch.ones(MIB), kept=kept)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert parcel.files is None
    assert parcel.slots[0].sum() == MIB
