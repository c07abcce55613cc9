"""Memory files that are written again, and the readers that keep them from it."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from losses import pseudo

import torchfedrpc as tfr
from torchfedrpc.errors import SerializationError
from torchfedrpc.wire import file_pool, memory_file
from torchfedrpc.wire.file import TensorFiles
from torchfedrpc.wire.file_pool import FilePool, MemoryFile

NUM_BYTES = 8192
WITHOUT_JOURNAL = pseudo(on_worker_lost="fail")  # a journal would keep the arguments, and so their files

# Opens or maps a file of another process and prints its first byte for each line of input.
READER = """
import ctypes, mmap, os, sys
path, form = sys.argv[1:]
descriptor = os.open(path, os.O_RDONLY)
if form != "open":
    libc = ctypes.CDLL(None)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
    flags = mmap.MAP_PRIVATE if form == "mapped privately" else mmap.MAP_SHARED
    address = libc.mmap(None, 8192, mmap.PROT_READ, flags, descriptor, 0)
    os.close(descriptor)
print("ready", flush=True)
for line in sys.stdin:
    byte = os.pread(descriptor, 1, 0) if form == "open" else ctypes.string_at(address, 1)
    print(byte[0], flush=True)
"""


@pytest.fixture
def pool() -> Iterator[FilePool]:
    pool = FilePool()
    yield pool
    pool.close()


@contextmanager
def reading(file: TensorFiles, form: str) -> Iterator[Callable[[], int]]:
    """A second process that has a file open or mapped; gives a function that returns the first byte it reads."""
    path = f"/proc/{os.getpid()}/fd/{memory(file).descriptor}"
    with subprocess.Popen(
        [sys.executable, "-c", READER, path, form], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        stdin, stdout = process.stdin, process.stdout

        def first_byte() -> int:
            print(file=stdin, flush=True)
            return int(stdout.readline())

        assert stdout.readline() == "ready\n"
        try:
            yield first_byte
        finally:
            stdin.close()


def filled(pool: FilePool, value: int, num_bytes: int = NUM_BYTES) -> TensorFiles:
    """A file of bytes of that value."""
    return TensorFiles.of([torch.full((num_bytes,), value, dtype=torch.uint8)], pool)


def memory(file: TensorFiles) -> MemoryFile:
    ((found, _),) = file._files
    return found


def content(file: MemoryFile) -> bytes:
    return os.pread(file.descriptor, file.num_bytes, 0)


def num_memory_files() -> int:
    """Memory files that this process has open, each counted once: its mapping has a descriptor too."""
    files = set()
    for entry in Path("/proc/self/fd").iterdir():
        if entry.is_symlink() and os.readlink(entry).startswith(f"/memfd:{memory_file.NAME}"):
            files.add(entry.stat().st_ino)
    return len(files)


def num_mappings() -> int:
    """Memory files that this process has mapped for writing."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    return sum(memory_file.NAME in line and " rw-s " in line for line in lines)


def test_this_kernel_shows_readers() -> None:
    assert memory_file.shows_readers()


def test_file_is_written_again_after_it_was_closed(pool: FilePool) -> None:
    first = filled(pool, 1)
    known = memory(first)
    second = filled(pool, 2)
    assert memory(second) is not known
    for value in (3, 4):  # the second time through the mapping that is there
        first.close()
        of_another_size = filled(pool, 0, 2 * NUM_BYTES)
        first = filled(pool, value)
        assert memory(of_another_size) is not known
        assert memory(first) is known
        assert content(known) == bytes([value]) * NUM_BYTES
    assert content(memory(second)) == bytes([2]) * NUM_BYTES


def test_all_chunks_are_written_to_a_file_that_is_used_again(pool: FilePool) -> None:
    filled(pool, 1).close()
    chunks: list[bytes | memoryview] = [bytes([2]) * 100, b"", memoryview(bytes([3]) * (NUM_BYTES - 100))]
    again = pool.file_of(chunks, NUM_BYTES)
    assert again.mapping is not None
    assert content(again) == b"".join(chunks)
    again.close()


def test_file_that_is_used_again_is_written_through_one_mapping(
    monkeypatch: pytest.MonkeyPatch, pool: FilePool
) -> None:
    filled(pool, 1).close()
    monkeypatch.setattr(memory_file, "write", None)  # what new files are written by
    for value in (2, 3):
        filled(pool, value).close()
        assert num_mappings() == 1
    pool.close()
    assert num_mappings() == 0


@pytest.mark.parametrize("form", ["open", "mapped privately", "mapped shared"])
def test_file_with_a_reader_in_another_process_is_not_written(pool: FilePool, form: str) -> None:
    first = filled(pool, 1)
    known = memory(first)
    with reading(first, form) as first_byte:
        first.close()
        second = filled(pool, 2)
        assert memory(second) is not known
        assert first_byte() == 1
    assert memory(filled(pool, 3)) is known


def test_file_that_this_process_has_mapped_is_not_written(pool: FilePool) -> None:
    file = TensorFiles.of([torch.ones(1000)], pool)
    (tensor,) = file.tensors()
    del file
    other = TensorFiles.of([torch.zeros(1000)], pool)
    assert tensor.eq(1).all()
    del tensor
    num_files = num_memory_files()
    again = TensorFiles.of([torch.zeros(1000)], pool)
    assert num_memory_files() == num_files
    assert other.tensors()[0].eq(0).all()
    assert again.tensors()[0].eq(0).all()


@pytest.mark.parametrize(("num_requests", "num_answers"), [(0, 0), (1, 0), (1, 1), (2, 1), (2, 2)])
def test_file_is_kept_only_if_all_requests_that_name_it_were_answered(
    pool: FilePool, num_requests: int, num_answers: int
) -> None:
    num_files = num_memory_files()
    files = TensorFiles.of([torch.ones(1000)], pool)
    for _ in range(num_requests):
        files.addresses()
    for _ in range(num_answers):
        files.answered()
    del files
    assert num_memory_files() - num_files == (num_requests == num_answers)


def test_pool_keeps_the_youngest_files_within_its_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    num_files = num_memory_files()
    pool = FilePool(3 * NUM_BYTES)
    files = [filled(pool, value) for value in range(6)]
    known = [memory(file) for file in files]
    for file in files:
        file.close()
    assert num_memory_files() - num_files == 3
    oldest = filled(pool, 0)
    assert memory(oldest) is known[3]
    monkeypatch.setattr(file_pool, "_MAX_FILES", 1)
    oldest.close()
    assert num_memory_files() - num_files == 1
    assert memory(filled(pool, 0)) is known[3]
    pool.close()


def test_few_files_with_readers_are_tried(monkeypatch: pytest.MonkeyPatch, pool: FilePool) -> None:
    files = [filled(pool, value) for value in range(4)]
    known = [memory(file) for file in files]
    readers = [os.open(f"/proc/self/fd/{file.descriptor}", os.O_RDONLY) for file in known[:3]]
    for file in files:
        file.close()
    monkeypatch.setattr(file_pool, "_MAX_TRIES", 2)
    fresh = filled(pool, 9)
    assert memory(fresh) not in known
    assert memory(filled(pool, 9)) is known[3]  # the next try begins behind the files of the first
    for reader in readers:
        os.close(reader)


def test_closed_pool_keeps_no_file(pool: FilePool) -> None:
    num_files = num_memory_files()
    file, other = filled(pool, 1), filled(pool, 2)
    file.close()
    pool.close()
    other.close()
    assert num_memory_files() == num_files
    filled(pool, 3).close()
    assert num_memory_files() == num_files


def test_file_whose_writing_fails_is_closed(monkeypatch: pytest.MonkeyPatch, pool: FilePool) -> None:
    num_files = num_memory_files()

    def fail(*args: Any) -> None:
        raise OSError("no memory")

    monkeypatch.setattr(memory_file, "write", fail)
    with pytest.raises(OSError, match="no memory"):
        filled(pool, 1)
    assert num_memory_files() == num_files


def test_garbage_collection_within_the_pool_does_not_wait_for_its_lock(
    monkeypatch: pytest.MonkeyPatch, pool: FilePool
) -> None:
    in_cycle = filled(pool, 0)
    in_cycle.itself = in_cycle  # type: ignore[attr-defined]
    is_freed = weakref.ref(in_cycle)
    del in_cycle
    first = filled(pool, 1)
    known = memory(first)
    first.close()
    has_reader = memory_file.has_reader

    def collect_and_look(descriptor: int) -> bool:
        gc.collect()
        return has_reader(descriptor)

    monkeypatch.setattr(memory_file, "has_reader", collect_and_look)
    assert memory(filled(pool, 2)) is known
    assert is_freed() is None


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_forked_child_leaves_the_files_to_its_parent(pool: FilePool) -> None:
    kept, in_use = filled(pool, 1), filled(pool, 2)
    known = [memory(kept), memory(in_use)]
    kept.close()
    with pool._lock:  # as another thread may have it
        if (child := os.fork()) == 0:
            status = 1
            try:
                own = filled(pool, 3)
                in_use.close()
                other = filled(pool, 4)
                pool.close()
                status = 2 if {memory(own), memory(other)} & {*known} else 0
            finally:
                os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert [content(file)[0] for file in known] == [1, 2]
    assert memory(filled(pool, 5)) is known[0]


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_tensors_that_a_forked_child_has_mapped_do_not_change(pool: FilePool) -> None:
    files = TensorFiles.of([torch.ones(1000)], pool)
    (tensor,) = files.tensors()
    is_rewritten, tell = os.pipe()
    if (child := os.fork()) == 0:
        os.read(is_rewritten, 1)
        os._exit(0 if tensor.eq(1).all() else 1)
    del tensor, files
    other = TensorFiles.of([torch.zeros(1000)], pool)
    os.write(tell, b"1")
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    os.close(is_rewritten)
    os.close(tell)
    assert other.tensors()[0].eq(0).all()


def test_without_leases_each_file_is_new(monkeypatch: pytest.MonkeyPatch, pool: FilePool) -> None:
    monkeypatch.setattr(memory_file, "shows_readers", lambda: False)
    num_files = num_memory_files()
    filled(pool, 1).close()
    assert num_memory_files() == num_files


@pytest.mark.parametrize("answer", [True, False])
def test_kernel_that_gives_the_same_answer_with_and_without_a_reader_is_found_out(
    monkeypatch: pytest.MonkeyPatch, answer: bool
) -> None:
    monkeypatch.setattr(memory_file, "has_reader", lambda descriptor: answer)
    assert not memory_file.shows_readers.__wrapped__()


def test_reader_accepts_a_file_of_a_pool_and_no_file_that_could_shrink(pool: FilePool) -> None:
    file = TensorFiles.of([torch.ones(1000)], pool)
    (tensor,) = TensorFiles.at(file.addresses(), os.getpid()).tensors()
    assert tensor.eq(1).all()
    unsealed = os.memfd_create(memory_file.NAME, os.MFD_ALLOW_SEALING)
    os.ftruncate(unsealed, 64)
    with pytest.raises(SerializationError, match="not there"):  # it could shrink
        TensorFiles.at([(unsealed, os.fstat(unsealed).st_ino, 64, [])], os.getpid())
    os.close(unsealed)


def test_acknowledged_file_is_used_again_though_it_was_named_twice(pool: FilePool) -> None:
    files = TensorFiles.of([torch.ones(1000)], pool)
    (address,) = files.addresses()
    files.addresses()  # in the next world, since the answer of the first was lost
    files.answered()
    files.acknowledged()
    del files
    again = TensorFiles.of([torch.zeros(1000)], pool)
    assert again.addresses()[0][:2] == address[:2]


class Collector:
    """Keeps all weights, none, or none and ends its worker in its first call."""

    def __init__(self, client_id: str) -> None:
        self.kept: list[torch.Tensor] = []

    def keep(self, weights: torch.Tensor) -> None:
        self.kept.append(weights)

    def means(self) -> list[float]:
        return [float(weights.mean()) for weights in self.kept]

    def mean(self, weights: torch.Tensor) -> float:
        return float(weights.mean())

    def end_first(self, weights: torch.Tensor, marker: str) -> float:
        if not os.path.exists(marker):
            Path(marker).touch()
            os._exit(1)
        return float(weights.mean())


async def test_pushes_write_to_the_same_files(monkeypatch: pytest.MonkeyPatch) -> None:
    create, num_created = memory_file.create, 0

    def count(num_bytes: int) -> int:
        nonlocal num_created
        num_created += num_bytes > 1 << 20
        return create(num_bytes)

    monkeypatch.setattr(memory_file, "create", count)
    num_files = num_memory_files()
    async with tfr.LearnerProxy(Collector, ["a"], runtime=WITHOUT_JOURNAL) as proxy:
        for value in range(20):
            assert await proxy.custom_method("a", "mean", torch.full((1 << 20,), float(value))) == value
    assert num_created <= 4
    assert num_memory_files() == num_files


async def test_weights_that_learners_keep_do_not_change() -> None:
    async with tfr.LearnerProxy(Collector, ["a", "b"], runtime=WITHOUT_JOURNAL) as proxy:
        weights = torch.zeros(1 << 20)
        for value in range(12):
            weights.fill_(value)
            await proxy.clients().call("keep" if value % 3 else "mean", weights)
        kept = [float(value) for value in range(12) if value % 3]
        assert set(map(tuple, (await proxy.clients().call("means")).values())) == {tuple(kept)}


async def test_files_of_a_request_that_was_never_answered_are_not_used_again(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    give_back, unanswered = MemoryFile.give_back, []

    def note(file: MemoryFile) -> None:
        if file.pool is not None:
            unanswered.append(file.num_requests)
        give_back(file)

    monkeypatch.setattr(MemoryFile, "give_back", note)
    async with tfr.LearnerProxy(Collector, ["a"], runtime=pseudo(num_processes=1)) as proxy:
        assert await proxy.custom_method("a", "mean", torch.ones(1 << 20)) == 1
        assert await proxy.custom_method("a", "end_first", torch.full((1 << 20,), 2.0), str(tmp_path / "marker")) == 2
    gc.collect()
    assert sorted(unanswered) == [0, 1]
