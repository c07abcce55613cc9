"""Files of tensors that other processes of this machine find, and what is refused as one."""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import resource
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from internals import members_of
from losses import pseudo

import torchfedrpc as tfr
from torchfedrpc.errors import SerializationError
from torchfedrpc.wire import memory_file
from torchfedrpc.wire.file import TensorFiles
from torchfedrpc.wire.packing import pack

TENSORS = [torch.arange(5.0), torch.ones(3, 4).t(), torch.zeros(2, dtype=torch.bfloat16), torch.empty(0)]


def test_it_is_found_by_its_address_and_has_what_was_put_in() -> None:
    files = TensorFiles.of(TENSORS)
    found = TensorFiles.at(files.addresses(), os.getpid())
    del files
    for tensor, original in zip(found.tensors(), TENSORS, strict=True):
        assert torch.equal(tensor, original)
        assert (tensor.dtype, tensor.stride()) == (original.dtype, original.stride())


def test_files_cannot_change_and_writes_to_a_mapping_stay_private() -> None:
    file = TensorFiles.of(TENSORS)
    ((number, *_),) = file.addresses()
    for change in (lambda: os.ftruncate(number, 1), lambda: os.pwrite(number, b"1", 0)):
        with pytest.raises(OSError, match="not permitted"):
            change()
    with pytest.raises(OSError, match="not permitted"):
        mmap.mmap(number, 0, mmap.MAP_SHARED, mmap.PROT_WRITE)
    mine, other = file.tensors()[0], file.tensors()[0]
    mine.add_(1)
    assert torch.equal(other, TENSORS[0])


@pytest.mark.parametrize(
    "change",
    [
        lambda number, inode, size, places: (number, inode + 1, size, places),  # the number was given to another file
        lambda number, inode, size, places: (number, inode, size + 4096, places),
        lambda number, inode, size, places: (number, inode, size, [(0, 1 << 20, "float32", (1 << 18,), (1,))]),
        lambda number, inode, size, places: (number, inode, size, [(0, 4, "float32", (5,), (1,))]),
        lambda number, inode, size, places: (number, inode, size, [(-64, 20, "float32", (5,), (1,))]),
        lambda number, inode, size, places: (number, inode, size, [(0, 20, "nn", (5,), (1,))]),
    ],
)
def test_an_address_that_does_not_fit_is_refused(change: Any) -> None:
    file = TensorFiles.of(TENSORS)
    (address,) = file.addresses()
    with pytest.raises(SerializationError):
        TensorFiles.at([change(*address)], os.getpid())


@pytest.mark.parametrize(
    "address",
    [
        None,
        5,
        [],
        ["../../../etc/passwd", 1, 1, []],
        [-1, 1, 1, []],
        [True, 1, 1, []],
        [3.0, 1, 1, []],
        [3, "1", 1, []],
        [3, 1, None, []],
        [3, 1, 1, {}],
        [3, 1, 1, [[0, 0, "float32", [1], ["1"]]]],
        [3, 1, 1, [[0, 0, "float32", [1, 2], [1]]]],
        [3, 1, 1, [[0, 0, 3, [], []]]],
        [10**4000, 1, 1, []],
    ],
)
def test_what_is_no_address_is_refused(address: Any) -> None:
    with pytest.raises((SerializationError, OSError)):
        TensorFiles.at([address], os.getpid())
    assert not TensorFiles.is_found(os.getpid(), [address])


@pytest.mark.parametrize("pid", ["1", "self/../1", -1, 0, None, True, 2.0])
def test_what_is_no_process_is_refused(pid: Any) -> None:
    probe = TensorFiles.probe()
    assert probe is not None
    assert TensorFiles.is_found(os.getpid(), probe.addresses())
    assert not TensorFiles.is_found(pid, probe.addresses())


def test_a_pipe_that_another_process_names_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    os.mkfifo(tmp_path / "pipe")
    descriptor = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    try:
        began = time.monotonic()
        assert not TensorFiles.is_found(os.getpid(), [(descriptor, os.fstat(descriptor).st_ino, 1, [])])
        monkeypatch.setattr(os, "readlink", lambda path: "/memfd:torchfedrpc-shared")  # it is changed under us
        assert not TensorFiles.is_found(os.getpid(), [(descriptor, os.fstat(descriptor).st_ino, 1, [])])
        assert time.monotonic() - began < 1
    finally:
        os.close(descriptor)


def test_file_that_may_still_shrink_is_refused() -> None:
    descriptor = os.memfd_create("torchfedrpc-shared", os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(descriptor, 64)
        fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, fcntl.F_SEAL_GROW)
        with pytest.raises(SerializationError, match="not there"):
            TensorFiles.at([(descriptor, os.fstat(descriptor).st_ino, 64, [])], os.getpid())
    finally:
        os.close(descriptor)


def test_another_file_of_a_process_is_not_read() -> None:
    with tempfile.TemporaryFile() as file:
        file.write(b"secret")
        file.flush()
        status = os.fstat(file.fileno())
        with pytest.raises((SerializationError, OSError)):
            TensorFiles.at([(file.fileno(), status.st_ino, status.st_size, [])], os.getpid())


class Taker:
    """Takes weights."""

    def __init__(self, client_id: str) -> None:
        self.weights: Any = None

    def take(self, weights: torch.Tensor) -> float:
        self.weights = weights
        return float(weights.sum())

    def give(self) -> Any:
        return self.weights

    def write(self) -> float:
        return float(self.weights.add_(1).sum())


@pytest.mark.parametrize("sees_files", [True, False])
async def test_workers_of_this_machine_map_what_is_large_and_others_are_sent_it(sees_files: bool) -> None:
    ids = ["a", "b", "c", "d"]
    async with tfr.LearnerProxy(Taker, ids, runtime={"execution_mode": "pseudo", "num_processes": 2}) as proxy:
        for member in members_of(proxy).values():
            assert member.sees_files
            member.client._sees_files = sees_files
        weights = torch.ones(1 << 20)
        assert set((await proxy.clients().call("take", weights)).values()) == {float(1 << 20)}
        assert await proxy.custom_method("a", "write") == float(2 << 20)
        assert await proxy.custom_method("b", "write") == float(2 << 20)
        assert float(weights.sum()) == 1 << 20


@pytest.mark.parametrize("finds_them", [True, False])
async def test_results_of_workers_whose_files_are_found_are_mapped(
    finds_them: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not finds_them:
        monkeypatch.setattr(TensorFiles, "is_found", lambda pid, addresses: False)
    async with tfr.LearnerProxy(Taker, ["a"], runtime={"execution_mode": "pseudo", "num_processes": 1}) as proxy:
        await proxy.custom_method("a", "take", torch.ones(1 << 20))
        weights = await proxy.custom_method("a", "give")
        assert float(weights.sum()) == 1 << 20
        del weights
        weights = await proxy.custom_method("a", "give")
        assert ("torchfedrpc-shared" in mapping_of(weights)) == finds_them


def mapping_of(tensor: torch.Tensor) -> str:
    """The line of this process's maps in which a tensor's memory lies."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        start, stop = (int(part, 16) for part in line.split()[0].split("-"))
        if start <= tensor.data_ptr() < stop:
            return line
    raise AssertionError("it lies nowhere")


@pytest.fixture
def few_descriptors() -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 100, hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


class Deaf:
    """A learner that keeps nothing."""

    def __init__(self, client_id: str) -> None: ...

    def take(self, weights: Any) -> float:
        return float(weights["layer0"][0])


async def test_values_of_many_rounds_need_few_descriptors(few_descriptors: None) -> None:
    async with tfr.LearnerProxy(Deaf, ["a", "b", "c", "d"], runtime=pseudo(journal_max_bytes=64 << 20)) as proxy:
        weights = {f"layer{number}": torch.zeros(1 << 15) for number in range(20)}  # 2.5 MB
        for number in range(60):
            weights["layer0"].fill_(number)
            assert set((await proxy.clients().call("take", weights)).values()) == {float(number)}


@pytest.mark.parametrize("num_left", [0, 1])
def test_value_stays_in_memory_when_descriptors_run_out(num_left: int) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    first_free = os.dup(0)
    os.close(first_free)
    resource.setrlimit(resource.RLIMIT_NOFILE, (first_free + num_left, hard))
    try:
        parcel = pack(torch.ones(1 << 20), in_files=True)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert parcel.files is None
    assert parcel.slots[0].sum() == 1 << 20


def test_value_stays_in_memory_while_the_kernel_moves_its_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(descriptor: int) -> None:
        raise OSError(errno.EBUSY, "Device or resource busy")

    monkeypatch.setattr(memory_file, "forbid_writing", refuse)
    parcel = pack(torch.ones(1 << 20), in_files=True)
    assert parcel.files is None
    assert parcel.slots[0].sum() == 1 << 20
