"""The journals of learners stay within their bounds: snapshots take the place of calls."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from conftest import opened
from internals import snapshots_are_stored
from losses import SEED, pseudo
from torch import Tensor

import torchfedrpc as tfr
from torchfedrpc.storage import BlobStore

SIZE = 1 << 18  # float32: 1 MiB
NUM_BYTES = 4 * SIZE
WORTH = 4  # times its own size that a snapshot has to free
NUM_PUSHES = 60
CLIENTS = ["small_1", "large_1", "large_2"]


class Pushed:
    """A learner that keeps the weights that it was given last, and much besides where its client is a large one."""

    def __init__(self, client_id: str) -> None:
        self.weights = torch.zeros(SIZE)
        self.moments = torch.rand(4 * SIZE if client_id.startswith("large") else 1)

    def set_model_weights(self, weights: Tensor) -> None:
        self.weights = weights
        self.moments += torch.rand(1)

    def sums(self) -> list[float]:
        return [float(self.weights.double().sum()), float(self.moments.double().sum())]

    def process_id(self) -> int:
        return os.getpid()


def weights_of(number: int) -> Tensor:
    return torch.full((SIZE,), float(number))


async def push(proxy: tfr.LearnerProxy, client: str, numbers: range) -> None:
    for number in numbers:
        await proxy.set_model_weights(client, weights_of(number))


async def check_rebuilt(proxy: tfr.LearnerProxy, client: str) -> None:
    """The learner has the same bits after its worker is lost."""
    before = await proxy.custom_method(client, "sums")
    os.kill(await proxy.custom_method(client, "process_id"), signal.SIGKILL)
    assert await proxy.custom_method(client, "sums") == before


@pytest.fixture(scope="module")
def proxy(runner: asyncio.Runner) -> Iterator[tfr.LearnerProxy]:
    runtime = pseudo(num_processes=1, journal_max_bytes=6 * NUM_BYTES)
    with opened(runner, tfr.LearnerProxy(Pushed, CLIENTS, runtime=runtime, seed=SEED)) as proxy:
        yield proxy


async def test_snapshots_of_a_pushed_model_free_several_times_their_size(proxy: tfr.LearnerProxy) -> None:
    before, most = proxy.stats()["snapshot_bytes"], 0
    for number in range(NUM_PUSHES):
        await push(proxy, "small_1", range(number, number + 1))
        most = max(most, proxy.stats()["journal_bytes"])
    num_snapshots = (proxy.stats()["snapshot_bytes"] - before) // NUM_BYTES
    assert 1 <= num_snapshots <= NUM_PUSHES // WORTH
    assert most <= 8 * NUM_BYTES  # one more than fits, and one that was answered while the snapshot was on its way
    await check_rebuilt(proxy, "small_1")


async def test_journal_of_a_learner_with_a_large_state_keeps_its_bound(proxy: tfr.LearnerProxy) -> None:
    before, num_pushes = proxy.stats()["snapshot_bytes"], 5 * WORTH - 1
    for number in range(num_pushes):
        await push(proxy, "large_1", range(number, number + 1))
        await snapshots_are_stored(proxy)  # the next push need not wait for that, and counts in max_inflight_bytes
        assert proxy.stats()["journal_bytes"] <= 8 * NUM_BYTES
    assert proxy.stats()["snapshot_bytes"] - before >= 5 * NUM_BYTES
    await check_rebuilt(proxy, "large_1")


async def test_calls_behind_a_snapshot_do_not_wait_until_it_is_stored(
    proxy: tfr.LearnerProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, may_end, ended, put = threading.Event(), threading.Event(), threading.Event(), BlobStore.put

    def slow_put(store: BlobStore, key: Any, pieces: Any) -> None:
        """On a thread of its own."""
        begun.set()
        assert may_end.wait(60)
        put(store, key, pieces)
        ended.set()

    monkeypatch.setattr(BlobStore, "put", slow_put)
    number = 0
    while not begun.is_set():
        await push(proxy, "large_2", range(number, number + 1))
        number += 1
    await push(proxy, "large_2", range(number, number + 5))
    assert not ended.is_set()
    may_end.set()
    while not ended.is_set():
        await proxy.custom_method("large_2", "sums")
    await check_rebuilt(proxy, "large_2")
