"""Learners beyond a limit wait on disk, with the same results and less memory."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path
from typing import Any

import pytest
import torch

import torchfedrpc as tfr

MODES: dict[str, dict[str, Any]] = {
    "local": {"execution_mode": "local"},
    "pseudo": {"execution_mode": "pseudo", "num_processes": 1},
}
CLIENTS = [f"client_{number}" for number in range(12)]


class Walker:
    """Has weights that walk at random, and how often they did."""

    def __init__(self, client_id: str, step: float = 1.0) -> None:
        self.weights = torch.randn(100) * step
        self.num_steps = 0

    def walk(self) -> tuple[int, float]:
        self.num_steps += 1
        self.weights = self.weights + torch.randn(100)
        return self.num_steps, float(self.weights.sum())

    async def stroll(self) -> tuple[int, float]:
        await asyncio.sleep(0.001)
        return self.walk()

    def walks(self) -> Any:
        while True:
            yield self.walk()

    def fail(self) -> None:
        raise ValueError("on purpose")


class Bound(Walker):
    """Cannot be captured."""

    def __init__(self, client_id: str) -> None:
        super().__init__(client_id)
        self.function = lambda: 1


@pytest.fixture(params=list(MODES))
def runtime(request: pytest.FixtureRequest) -> dict[str, Any]:
    return MODES[request.param]


async def journey(runtime: dict[str, Any]) -> list[Any]:
    """What calls of every kind give, in rounds of some clients."""
    steps: dict[str, dict[str, float]] = {client: {"step": float(number)} for number, client in enumerate(CLIENTS)}
    seen: list[Any] = []
    async with tfr.LearnerProxy(Walker, steps, runtime=runtime, seed=3) as proxy:
        for number in range(3):
            seen.append(dict(await proxy.clients(CLIENTS[number::2]).call("walk")))
            seen.append(dict(await proxy.clients(CLIENTS[::3]).call("stroll")))
            seen.append([await proxy.custom_method(client, "walk") for client in CLIENTS[number:6]])
        result = await proxy.clients().options(on_error="collect").call("fail")
        seen.append(sorted(result.failures))
        async for item in proxy.stream(CLIENTS[0], "walks"):
            seen.append(item)
            seen.append(dict(await proxy.clients(CLIENTS[5:]).call("walk")))  # beside a stream that stays open
            if item[0] > 8:
                break
        snapshots = {client: data async for client, data in proxy.snapshots()}
        await proxy.clients().call("walk")
        await proxy.restore(snapshots)
        seen.append(dict(await proxy.clients().call("walk")))
    return seen


async def test_bits_do_not_depend_on_how_many_learners_are_in_memory(runtime: dict[str, Any]) -> None:
    expected = await journey(MODES["local"])
    for limit in (1, 3):
        assert await journey({**runtime, "max_resident_learners": limit}) == expected


async def test_no_more_than_the_limit_are_in_memory() -> None:
    async with tfr.LearnerProxy(Walker, CLIENTS, runtime={"max_resident_learners": 3}) as proxy:
        for _ in range(3):
            await proxy.clients().call("walk")
            assert proxy.stats()["workers"]["local"]["learners"] == 3


async def test_with_several_methods_at_once_each_learner_goes_on_from_its_own_state() -> None:
    runtime = {"execution_mode": "local", "max_resident_learners": 2, "max_concurrent_calls": 3}
    async with tfr.LearnerProxy(Walker, CLIENTS, runtime=runtime) as proxy:
        for number in range(1, 6):
            counts = {count for count, _ in (await proxy.clients().call("walk")).values()}
            assert counts == {number}


async def test_a_learner_that_cannot_be_captured_stays(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "torchfedrpc"):
        async with tfr.LearnerProxy(Bound, CLIENTS[:4], runtime={"max_resident_learners": 2}) as proxy:
            for number in range(1, 4):
                assert {count for count, _ in (await proxy.clients().call("walk")).values()} == {number}
            assert proxy.stats()["workers"]["local"]["learners"] == 4
    warnings = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert len(warnings) == 1
    assert "stays in memory beyond max_resident_learners" in warnings[0].getMessage()


async def test_a_full_disk_keeps_learners_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("torchfedrpc.storage.BlobStore.put", full)
    async with tfr.LearnerProxy(Walker, CLIENTS, runtime={"max_resident_learners": 2}) as proxy:
        for number in range(1, 3):
            assert {count for count, _ in (await proxy.clients().call("walk")).values()} == {number}


async def test_a_lost_workers_learners_are_rebuilt_wherever_they_were(tmp_path: Path) -> None:
    runtime = {**MODES["pseudo"], "num_processes": 2, "max_resident_learners": 2}
    expected = []
    async with tfr.LearnerProxy(Walker, CLIENTS, runtime="local", seed=5) as proxy:
        expected = [dict(await proxy.clients().call("walk")) for _ in range(4)]
    faults = tfr.testing.Faults().kill("worker1", at_call=9)
    async with tfr.LearnerProxy(Walker, CLIENTS, runtime=runtime, seed=5) as proxy, faults.injected(proxy):
        assert [dict(await proxy.clients().call("walk")) for _ in range(4)] == expected


async def test_a_learner_restored_to_before_its_first_call_is_made_once_it_was_evicted(
    runtime: dict[str, Any],
) -> None:
    clients = ["a", "b", "c"]
    async with tfr.LearnerProxy(Walker, clients, runtime=runtime | {"max_resident_learners": 1}) as proxy:
        start = {client: data async for client, data in proxy.snapshots()}
        first = await proxy.clients().call("walk")
        await proxy.restore(start)
        for _ in range(2):
            again = {client: await proxy.client(client).walk() for client in clients}
            assert [number for number, _ in again.values()] == [1, 1, 1]
            assert again == first
            await proxy.restore(start)
