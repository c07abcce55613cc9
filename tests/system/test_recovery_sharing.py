"""A lost worker, and what calls have in common: the value is where it is needed again, and no longer than that."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from itertools import islice
from typing import Any

import pytest
import torch
from conftest import Latch, opened, shared_memory_of
from learners import Mortal
from losses import SEED, Losses, kill, on_1, on_2, pid_of, pseudo, seen
from torch import Tensor

import torchfedrpc as tfr

__all__ = ["on_1", "on_2", "seen"]  # fixtures

SIZE = 600_000  # float32: large enough to lie in files
NUM_BYTES = 4 * SIZE


class Adding(Mortal):
    """A learner that adds up what it is given."""

    def add(self, weights: Tensor) -> float:
        self.kept = weights.clone() if self.kept is None else self.kept + weights
        return float(self.kept[0])

    def add_and_hold(self, weights: Tensor, until: str) -> float:
        total = self.add(weights)
        tfr.current_call().report("holding")
        self.hold_regardless(until)
        return total

    def totals(self, weights: Tensor, times: int) -> Iterator[float]:
        for _ in range(times):
            yield self.add(weights)


@pytest.fixture(scope="module")
def proxy(runner: asyncio.Runner) -> Iterator[tfr.LearnerProxy]:
    """Learners on two workers; every test takes clients of its own by `on_1` and `on_2`."""
    clients = [f"{place}_{number}" for place in ("first", "second") for number in range(40)]
    with opened(runner, tfr.LearnerProxy(Adding, clients, runtime=pseudo(), seed=SEED)) as proxy:
        yield proxy


async def add(proxy: tfr.LearnerProxy, ids: list[str], argument: Any) -> set[float]:
    return set((await proxy.clients(ids).call("add", argument)).values())


async def test_a_rebuilt_learner_has_what_its_calls_had(
    proxy: tfr.LearnerProxy, seen: Losses, on_1: Iterator[str], on_2: Iterator[str]
) -> None:
    ids, weights = [*islice(on_1, 3), *islice(on_2, 2)], torch.ones(SIZE)
    ref = await proxy.share(torch.full((SIZE,), 10.0))
    assert await add(proxy, ids, weights) == {1.0}
    assert await add(proxy, ids, ref) == {11.0}
    weights.fill_(100)
    assert await add(proxy, ids, weights) == {111.0}
    await ref.release()
    del ref
    kill(proxy, "worker1")
    await seen.loss()
    weights.fill_(1000)
    assert await add(proxy, ids, weights) == {1111.0}
    async with asyncio.timeout(10):
        while shared_memory_of(pid_of(proxy, "worker1")):  # of the reference, which is released
            await asyncio.sleep(0.02)


async def test_a_reference_is_placed_again_where_its_worker_was_lost(
    proxy: tfr.LearnerProxy, seen: Losses, on_1: Iterator[str], on_2: Iterator[str]
) -> None:
    ids = [*islice(on_1, 2), *islice(on_2, 2)]
    ref = await proxy.share(torch.ones(SIZE))
    for number in range(1, 3):
        assert await add(proxy, ids, ref) == {2.0 * number - 1}
        before = proxy.stats()["bytes_sent"]
        kill(proxy, "worker1")
        await seen.loss(number)
        assert await add(proxy, ids, ref) == {2.0 * number}
        assert await add(proxy, [*islice(on_1, 1), *islice(on_2, 1)], ref) == {1.0}
        assert proxy.stats()["bytes_sent"] - before < 5 * NUM_BYTES
    del ref
    async with asyncio.timeout(10):
        while shared_memory_of(pid_of(proxy, "worker1")) or shared_memory_of(pid_of(proxy, "worker2")):
            await asyncio.sleep(0.02)


@pytest.mark.parametrize("is_placed", [False, True], ids=["common argument", "reference"])
async def test_calls_that_a_loss_interrupts_have_their_value_when_they_are_asked_again(
    proxy: tfr.LearnerProxy, seen: Losses, on_1: Iterator[str], on_2: Iterator[str], latch: Latch, is_placed: bool
) -> None:
    ids, queued = [next(on_1), next(on_2)], [*islice(on_1, 2), *islice(on_2, 2)]
    weights: Any = torch.ones(SIZE)
    argument = await proxy.share(weights) if is_placed else weights
    running = [asyncio.create_task(proxy.custom_method(one, "add_and_hold", argument, latch.path)) for one in ids]
    await asyncio.gather(*map(seen.reported, ids))
    waiting = [asyncio.create_task(proxy.custom_method(one, "add", argument)) for one in (*ids, *queued)]
    await asyncio.sleep(0)
    weights.fill_(50)
    if is_placed:
        await argument.release()
    kill(proxy, "worker1")
    await seen.loss()
    latch.open()
    assert await asyncio.gather(*running) == [1.0, 1.0]
    assert await asyncio.gather(*waiting) == [2.0, 2.0, 1.0, 1.0, 1.0, 1.0]


async def test_calls_that_are_submitted_while_the_world_is_formed_have_their_value(
    proxy: tfr.LearnerProxy, seen: Losses, on_1: Iterator[str], on_2: Iterator[str]
) -> None:
    ids = [*islice(on_1, 3), *islice(on_2, 3)]
    ref, weights = await proxy.share(torch.full((SIZE,), 10.0)), torch.ones(SIZE)
    await add(proxy, ids, ref)
    kill(proxy, "worker1")
    await seen.loss()
    calls = [asyncio.create_task(add(proxy, ids, argument)) for argument in (weights, ref)]
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    weights.fill_(50)
    await ref.release()
    assert await asyncio.gather(*calls) == [{11.0}, {21.0}]


async def test_a_stream_that_was_read_is_replayed_with_its_released_value(
    proxy: tfr.LearnerProxy, seen: Losses, on_1: Iterator[str]
) -> None:
    one, ref = next(on_1), await proxy.share(torch.ones(SIZE))
    items = [item async for item in proxy.stream(one, "totals", ref, 4)]
    assert items == [1.0, 2.0, 3.0, 4.0]
    await ref.release()
    kill(proxy, "worker1")
    await seen.loss()
    again = proxy.stream(one, "totals", torch.ones(SIZE), 2)
    assert [item async for item in again] == [5.0, 6.0]
