"""What tests of lost workers share: whom to kill, what to wait for, and what an undisturbed run gives."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Iterator, Sequence
from typing import Any

import internals
import pytest
from conftest import Seen
from internals import members_of
from learners import Mortal
from summing import Adder, Brackets

import torchfedrpc as tfr
from torchfedrpc.events import CallEnded, Event, WorkerLost, WorldFormed
from torchfedrpc.reduce.tree import fold

SEED = 11
NUM_STEPS = 6
NUM_ITEMS = 6
NUM_DRAWS = 3


class Losses(Seen):
    """The events of a proxy, with the time of each loss."""

    def __init__(self) -> None:
        super().__init__()
        self.lost: list[tuple[str, float]] = []  # worker, when it was noticed

    def __call__(self, event: Event) -> None:
        if isinstance(event, WorkerLost):
            self.lost.append((event.worker, time.monotonic()))
        super().__call__(event)

    @property
    def workers(self) -> list[str]:
        return [worker for worker, _ in self.lost]

    @property
    def formed(self) -> list[WorldFormed]:
        return [event for event in self.events if isinstance(event, WorldFormed)]

    async def loss(self, number: int = 1) -> float:
        """Wait for that loss; when it was noticed."""
        await self.until(lambda: len(self.lost) >= number)
        return self.lost[number - 1][1]

    async def world(self, number: int = 1) -> None:
        """Wait until so many worlds were formed."""
        await self.until(lambda: len(self.formed) >= number)


# Fixtures of modules whose `proxy` has two workers.


@pytest.fixture(scope="module")
def on_1(proxy: tfr.LearnerProxy) -> Iterator[str]:
    """Clients on the first worker that no test has had yet."""
    return iter(proxy.client_ids[: len(proxy.client_ids) // 2])


@pytest.fixture(scope="module")
def on_2(proxy: tfr.LearnerProxy) -> Iterator[str]:
    """Clients on the second one."""
    return iter(proxy.client_ids[len(proxy.client_ids) // 2 :])


@pytest.fixture
def seen(proxy: tfr.LearnerProxy) -> Iterator[Losses]:
    seen = Losses()
    unsubscribe = proxy.subscribe(seen)
    yield seen
    unsubscribe()


# Losing workers.


def pseudo(**settings: Any) -> dict[str, Any]:
    """A runtime of pseudo mode with these settings."""
    return {"execution_mode": "pseudo", "num_processes": 2, **settings}


def pid_of(proxy: tfr.LearnerProxy, worker: str) -> int:
    """The process that has this worker's name now."""
    pid = internals.pid_of(proxy, worker)
    assert pid is not None, f"{worker} has no process now"
    return pid


def kill(proxy: tfr.LearnerProxy, worker: str) -> float:
    """Kill a worker; when that was."""
    os.kill(pid_of(proxy, worker), signal.SIGKILL)
    return time.monotonic()


def kill_started(proxy: tfr.LearnerProxy, worker: str) -> float:
    """Kill a worker that may not be ready yet; when that was."""
    pid = internals.started_pid_of(proxy, worker)
    assert pid is not None, f"{worker} has no process now"
    os.kill(pid, signal.SIGKILL)
    return time.monotonic()


async def kill_once_started(proxy: tfr.LearnerProxy, worker: str) -> None:
    """Kill the replacement of a lost worker as soon as there is one."""
    while worker not in members_of(proxy):
        await asyncio.sleep(0)
    kill(proxy, worker)


def once_ended(proxy: tfr.LearnerProxy, count: int, then: Any) -> Any:
    """Call something as soon as so many calls have ended."""
    num_ended = 0

    def on_event(event: Event) -> None:
        nonlocal num_ended
        if isinstance(event, CallEnded):
            num_ended += 1
            if num_ended == count:
                then()

    return proxy.subscribe(on_event)


# What an undisturbed run gives.


async def undisturbed(clients: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Client -> method -> the results of its calls one after another, or its items, in local mode."""
    results: dict[str, dict[str, Any]] = {client: {"step": []} for client in clients}
    async with tfr.LearnerProxy(Mortal, clients, runtime="local", seed=SEED) as proxy:
        for _ in range(NUM_STEPS):
            for client, result in (await proxy.clients().call("step")).items():
                results[client]["step"].append(result)
        for client in clients:
            for method in ("draw_stream", "draw_async_stream"):
                results[client][method] = [item async for item in proxy.stream(client, method, NUM_ITEMS)]
    return results


class Steps:
    """Asks learners to step, and knows what an undisturbed run would give."""

    def __init__(self, proxy: tfr.LearnerProxy, expected: dict[str, dict[str, Any]]) -> None:
        self._proxy = proxy
        self._expected = {client: iter(expected[client]["step"]) for client in expected}

    async def check(self, *clients: str) -> None:
        """One step of each, at once, with the right bits."""
        result = await self._proxy.clients(clients).call("step")
        assert dict(result) == {client: next(self._expected[client]) for client in clients}


# Reductions.


async def draw(clients: list[str]) -> dict[str, list[str]]:
    """Client -> what its `draw_text` gives, time after time, in an undisturbed run."""
    async with tfr.LearnerProxy(Adder, clients, runtime="local", seed=SEED) as proxy:
        rounds = [await proxy.clients().call("draw_text") for _ in range(NUM_DRAWS)]
    return {client: [results[client] for results in rounds] for client in clients}


def number(client_id: str) -> str:
    return client_id.rpartition("_")[2]


def brackets(texts: Any) -> str | None:
    return fold(texts, "({}+{})".format)


def of_draw(drawn: dict[str, list[str]], clients: list[str], count: int = 0) -> str | None:
    """How the results of that draw come together."""
    return brackets([drawn[client][count] for client in clients])


async def check_draw(
    proxy: tfr.LearnerProxy, drawn: dict[str, list[str]], clients: list[str], count: int, reducer: Any = Brackets
) -> None:
    """A reduction over the clients' next draws, with the bits of an undisturbed run."""
    result = await proxy.clients(clients).reduce("draw_text", reducer)
    assert (result.value, result.count, result.failures) == (of_draw(drawn, clients, count), len(clients), {})
