"""Files of tensors that other processes of this machine find, and what is refused as one."""

from __future__ import annotations

import os
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import torchfedrpc as tfr
from torchfedrpc.errors import SerializationError
from torchfedrpc.wire.file import TensorFile, TensorFiles

TENSORS = [torch.arange(5.0), torch.ones(3, 4).t(), torch.zeros(2, dtype=torch.bfloat16), torch.empty(0)]


def test_it_is_found_by_its_address_and_has_what_was_put_in() -> None:
    files = TensorFiles.of(TENSORS)
    found = TensorFiles.at(files.addresses(), os.getpid())
    del files
    for tensor, original in zip(found.tensors(), TENSORS, strict=True):
        assert torch.equal(tensor, original)
        assert (tensor.dtype, tensor.stride()) == (original.dtype, original.stride())


def test_whoever_maps_it_changes_it_for_nobody_else() -> None:
    file = TensorFile.of(TENSORS)
    with pytest.raises(OSError, match="not permitted"):
        os.ftruncate(file.address()[0], 1)  # who touched what is gone would be killed
    mine, other = file.tensors()[0], file.tensors()[0]
    mine.add_(1)
    assert torch.equal(other, TENSORS[0])


@pytest.mark.parametrize(
    "change",
    [
        lambda number, inode, size, stamp, places: (
            number,
            inode + 1,
            size,
            stamp,
            places,
        ),  # its number was given to another
        lambda number, inode, size, stamp, places: (number, inode, size + 4096, stamp, places),
        lambda number, inode, size, stamp, places: (number, inode, size, stamp + 1, places),  # it was written again
        lambda number, inode, size, stamp, places: (
            number,
            inode,
            size,
            stamp,
            [(0, 1 << 20, "float32", (1 << 18,), (1,))],
        ),
        lambda number, inode, size, stamp, places: (number, inode, size, stamp, [(0, 4, "float32", (5,), (1,))]),
        lambda number, inode, size, stamp, places: (number, inode, size, stamp, [(-64, 20, "float32", (5,), (1,))]),
        lambda number, inode, size, stamp, places: (number, inode, size, stamp, [(0, 20, "nn", (5,), (1,))]),
    ],
)
def test_an_address_that_does_not_fit_is_refused(change: Any) -> None:
    file = TensorFile.of(TENSORS)
    with pytest.raises(SerializationError):
        TensorFile.at(change(*file.address()), os.getpid())


@pytest.mark.parametrize(
    "address",
    [
        None,
        5,
        [],
        ["../../../etc/passwd", 1, 1, 1, []],
        [-1, 1, 1, 1, []],
        [True, 1, 1, 1, []],
        [3.0, 1, 1, 1, []],
        [3, "1", 1, 1, []],
        [3, 1, None, 1, []],
        [3, 1, 1, 1, {}],
        [3, 1, 1, 1, [[0, 0, "float32", [1], ["1"]]]],
        [3, 1, 1, 1, [[0, 0, "float32", [1, 2], [1]]]],
        [3, 1, 1, 1, [[0, 0, 3, [], []]]],
        [10**4000, 1, 1, 1, []],
    ],
)
def test_what_is_no_address_is_refused(address: Any) -> None:
    with pytest.raises((SerializationError, OSError)):
        TensorFile.at(address, os.getpid())
    assert not TensorFile.is_found(os.getpid(), address)


@pytest.mark.parametrize("pid", ["1", "self/../1", -1, 0, None, True, 2.0])
def test_what_is_no_process_is_refused(pid: Any) -> None:
    address = TensorFile.of([]).address()
    assert not TensorFile.is_found(pid, address)


def test_a_pipe_that_another_process_names_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    os.mkfifo(tmp_path / "pipe")
    descriptor = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    try:
        began = time.monotonic()
        assert not TensorFile.is_found(os.getpid(), (descriptor, os.fstat(descriptor).st_ino, 1, 0, []))
        monkeypatch.setattr(os, "readlink", lambda path: "/memfd:torchfedrpc-shared")  # it is changed under us
        assert not TensorFile.is_found(os.getpid(), (descriptor, os.fstat(descriptor).st_ino, 1, 0, []))
        assert time.monotonic() - began < 1
    finally:
        os.close(descriptor)


def test_another_file_of_a_process_is_not_read() -> None:
    with tempfile.TemporaryFile() as file:
        file.write(b"secret")
        file.flush()
        status = os.fstat(file.fileno())
        with pytest.raises((SerializationError, OSError)):
            TensorFile.at((file.fileno(), status.st_ino, status.st_size, 0, []), os.getpid())


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
        executor: Any = proxy._router._main
        for member in executor._group.members.values():
            assert member.sees_files
            executor._group.hosts[member.label]._sees_files = sees_files
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
        monkeypatch.setattr(TensorFile, "is_found", lambda pid, address: False)
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
