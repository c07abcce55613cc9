"""Large results in files of their worker, which the driver maps: they behave as results that are sent."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Latch, opened, shared_memory_of
from learners import Mortal
from losses import Losses, kill, on_1, on_2, pid_of, pseudo, seen
from torch import Tensor

import torchfedrpc as tfr
from torchfedrpc.wire.file import TensorFiles

__all__ = ["on_1", "on_2", "seen"]  # fixtures

SIZE = 600_000  # float32, 2.4 MB: large enough to lie in files


class Keeping(Mortal):
    """A learner that returns what it keeps, so that a copy is due."""

    def __init__(self, client_id: str) -> None:
        super().__init__(client_id)
        self.weights = {"bias": torch.zeros(3), "layer": torch.zeros(SIZE), "half": torch.zeros(9).half()}
        self.rows = torch.zeros(2, SIZE)
        self.array = np.zeros(SIZE, dtype=np.float32)

    def get(self) -> dict[str, Tensor]:
        return self.weights

    def fill_and_get(self, value: float) -> dict[str, Tensor]:
        for tensor in self.weights.values():
            tensor.fill_(value)
        return self.weights

    async def get_later(self) -> dict[str, Tensor]:
        await asyncio.sleep(0)
        return self.weights

    def items(self, count: int) -> Iterator[Tensor]:
        for number in range(count):
            self.weights["layer"].fill_(number)
            yield self.weights["layer"]

    async def items_later(self, count: int) -> AsyncIterator[Tensor]:
        for item in self.items(count):
            yield item

    def get_tied(self) -> tuple[Tensor, Tensor, np.ndarray[Any, Any]]:
        return self.rows, self.rows[1], self.array

    def hold_and_get(self, until: str) -> dict[str, Tensor]:
        tfr.current_call().report("holding")
        self.hold_regardless(until)
        return self.fill_and_get(7)


@pytest.fixture(scope="module")
def proxy(runner: asyncio.Runner) -> Iterator[tfr.LearnerProxy]:
    clients = [f"{place}_{number}" for place in ("first", "second") for number in range(20)]
    with opened(runner, tfr.LearnerProxy(Keeping, clients, runtime=pseudo())) as proxy:
        yield proxy


async def test_mapped_results_belong_to_the_caller(proxy: tfr.LearnerProxy, on_1: Iterator[str]) -> None:
    learner = proxy.client(next(on_1))
    kept = []
    for value in range(5):
        weights = await learner.fill_and_get(value)
        assert shared_memory_of(os.getpid()) > 0
        assert list(weights) == ["bias", "layer", "half"]
        kept.append(weights)
    for value, weights in enumerate(kept):
        assert all(tensor.eq(value).all() for tensor in weights.values())
        weights["layer"] += 100
    assert (await learner.get())["layer"].eq(4).all()
    assert kept[0]["layer"].eq(100).all()


async def test_mapped_results_leave_no_memory_behind(proxy: tfr.LearnerProxy, on_1: Iterator[str]) -> None:
    learner, pid = proxy.client(next(on_1)), pid_of(proxy, "worker1")
    for value in range(60):
        weights = await learner.fill_and_get(value)
        assert weights["layer"].eq(value).all()
    del weights
    async with asyncio.timeout(10):
        while shared_memory_of(os.getpid()):
            await asyncio.sleep(0.01)
    assert shared_memory_of(pid) < 30  # of outcomes that may be asked for again


@pytest.mark.parametrize("method", ["get", "get_later"])
async def test_tied_tensors_and_arrays_are_returned_beside_mapped_results(
    proxy: tfr.LearnerProxy, on_1: Iterator[str], method: str
) -> None:
    learner = proxy.client(next(on_1))
    assert (await getattr(learner, method)())["half"].dtype == torch.float16
    both, second, array = await learner.get_tied()
    second += 1
    assert both[1].eq(1).all()
    assert both[0].eq(0).all()
    array += 1
    assert array.flags.writeable
    assert array.sum() == SIZE


@pytest.mark.parametrize("method", ["items", "items_later"])
async def test_items_of_a_stream_are_mapped_as_they_were_yielded(
    proxy: tfr.LearnerProxy, on_1: Iterator[str], method: str
) -> None:
    items = [item async for item in proxy.stream(next(on_1), method, 4)]
    assert [float(item.sum()) for item in items] == [SIZE * number for number in range(4)]


async def test_mapped_results_are_returned_again_after_a_loss(
    proxy: tfr.LearnerProxy, seen: Losses, on_1: Iterator[str], on_2: Iterator[str], latch: Latch
) -> None:
    ids = [next(on_1), next(on_2)]
    calls = [asyncio.create_task(proxy.custom_method(one, "hold_and_get", latch.path)) for one in ids]
    await asyncio.gather(*map(seen.reported, ids))
    kill(proxy, "worker1")
    await seen.loss()
    latch.open()
    for weights in await asyncio.gather(*calls):
        assert all(tensor.eq(7).all() for tensor in weights.values())


async def test_a_worker_that_dies_before_they_are_mapped_has_not_answered(
    proxy: tfr.LearnerProxy, seen: Losses, on_1: Iterator[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    learner, find = proxy.client(next(on_1)), TensorFiles.at
    await learner.fill_and_get(3)

    def find_too_late(addresses: Any, pid: int, **options: Any) -> TensorFiles:
        monkeypatch.setattr(TensorFiles, "at", find)
        os.kill(pid, signal.SIGKILL)
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
        return find(addresses, pid)

    monkeypatch.setattr(TensorFiles, "at", find_too_late)
    weights = await learner.get()
    await seen.loss()
    assert all(tensor.eq(3).all() for tensor in weights.values())


@pytest.mark.parametrize(
    ("reason", "error", "num_worlds"),
    [
        (OSError(24, "Too many open files"), tfr.SerializationError, 0),
        (OSError(2, "No such file or directory"), tfr.WorkerLostError, 1),  # by a fault of ours: it is found out
    ],
)
async def test_results_that_cannot_be_mapped_are_an_error_of_their_call(
    proxy: tfr.LearnerProxy,
    seen: Losses,
    on_1: Iterator[str],
    monkeypatch: pytest.MonkeyPatch,
    reason: OSError,
    error: type[Exception],
    num_worlds: int,
) -> None:
    learner, other = proxy.client(next(on_1)), proxy.client(next(on_1))
    find = TensorFiles.at
    refused: list[Any] = []

    def refuse_once(addresses: Any, pid: int, **options: Any) -> TensorFiles:
        if not refused:
            refused.append(addresses)
            raise reason
        return find(addresses, pid)

    monkeypatch.setattr(TensorFiles, "at", refuse_once)
    with pytest.raises(error, match=reason.strerror):
        await learner.get()
    assert (await other.get())["layer"].eq(0).all()
    assert (await learner.get())["layer"].eq(0).all()
    assert len(seen.formed) == num_worlds
