"""What tests of lost workers share: whom to kill, what to wait for, and what an undisturbed run gives."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Sequence
from typing import Any

from conftest import Seen
from learners import Mortal

import torchfedrpc as tfr
from torchfedrpc.observe.events import Event, WorkerLost, WorldFormed

SEED = 11
NUM_STEPS = 6
NUM_ITEMS = 6


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


def pseudo(**settings: Any) -> dict[str, Any]:
    """A runtime of pseudo mode with these settings."""
    return {"execution_mode": "pseudo", "num_processes": 2, **settings}


def pid_of(proxy: tfr.LearnerProxy, worker: str) -> int:
    """The process that has this worker's name now."""
    executor: Any = proxy._router._main
    pid: int = executor._processes[executor._group.members[worker]].pid
    return pid


def kill(proxy: tfr.LearnerProxy, worker: str) -> float:
    """Kill a worker; when that was."""
    os.kill(pid_of(proxy, worker), signal.SIGKILL)
    return time.monotonic()


async def kill_once_started(proxy: tfr.LearnerProxy, worker: str) -> None:
    """Kill the replacement of a lost worker as soon as there is one."""
    executor: Any = proxy._router._main
    while worker not in executor._group.members:
        await asyncio.sleep(0)
    kill(proxy, worker)


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
