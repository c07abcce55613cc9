"""Kinds with async methods, streams, and settings of a thread or a context."""

from __future__ import annotations

import asyncio
import contextvars
import decimal
import random
from collections.abc import AsyncIterator, Iterator
from typing import Any

import numpy as np
import torch

import torchfedrpc as tfr
from corpus.bits import Trained, bits
from corpus.registry import SAME, ask, kind, stream

_tag: contextvars.ContextVar[str] = contextvars.ContextVar("corpus_tag", default="none")


class _Drawing:
    def __init__(self, client_id: str) -> None:
        self.total = 0.0

    async def _draw(self, pauses: int = 2) -> float:
        drawn = 0.0
        for _ in range(pauses):
            await asyncio.sleep(0)
            drawn += float(torch.randn(())) + np.random.rand() + random.random()
        return drawn


@kind(num_clients=2)
class AsyncDraws(_Drawing):
    """An async method that draws between its awaits."""

    async def step(self) -> str:
        self.total += await self._draw()
        return bits(self.total)


@kind(num_clients=2)
class GatherDraws(_Drawing):
    """`asyncio.gather` of parts that draw."""

    async def step(self) -> str:
        parts = await asyncio.gather(*(self._draw(number) for number in range(1, 4)))
        self.total += sum(parts)
        return bits(self.total, parts)


@kind(num_clients=2)
class TaskDraws(_Drawing):
    """`create_task`, of which one part draws beside its parent."""

    async def step(self) -> str:
        task = asyncio.create_task(self._draw(3))
        self.total += await self._draw(2) + await task
        return bits(self.total)


@kind(num_clients=2)
class TaskGroupDraws(_Drawing):
    """A `TaskGroup` of parts that draw."""

    async def step(self) -> str:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(self._draw(number)) for number in range(1, 4)]
        self.total += sum(task.result() for task in tasks)
        return bits(self.total)


@kind(num_clients=2)
class WaitForDraws(_Drawing):
    """`wait_for` around a part that draws."""

    async def step(self) -> str:
        self.total += await asyncio.wait_for(self._draw(3), 60)
        return bits(self.total)


@kind(num_clients=2)
class TrainsInTasks(Trained):
    """Training with dropout in a task, beside an evaluation in another."""

    async def step(self) -> str:
        async def train() -> float:
            await asyncio.sleep(0)
            with torch.no_grad():
                self.x = torch.nn.functional.dropout(self.x, 0.1)
            return self.train()

        async def evaluate() -> float:
            await asyncio.sleep(0)
            return float(torch.randn(()))

        return bits(await asyncio.gather(train(), evaluate()), *self.model.parameters())


@kind("start", "finish", "start", "finish", refused="'task'", ways={"evicted": SAME})
class TaskKept(_Drawing):
    """A task that a call starts and a later one awaits."""

    task: Any = None

    async def start(self) -> str:
        self.task = asyncio.create_task(self._plain())
        return "started"

    async def _plain(self) -> float:
        await asyncio.sleep(0)
        self.total += 1
        return self.total

    async def finish(self) -> str:
        result = await self.task
        self.task = None
        return bits(result)


@kind(stream("items", 3), "look", stream("items", 2), "look")
class Streams:
    """A generator method that draws and counts."""

    def __init__(self, client_id: str) -> None:
        self.count = 0

    def items(self, number: int) -> Iterator[str]:
        for _ in range(number):
            self.count += 1
            yield bits(self.count, torch.rand(()).item(), np.random.rand())

    def look(self) -> str:
        return bits(self.count)


@kind(stream("items", 3), "look", stream("items", 2), "look")
class AsyncStreams:
    """An async generator method that draws between its awaits."""

    def __init__(self, client_id: str) -> None:
        self.count = 0

    async def items(self, number: int) -> AsyncIterator[str]:
        for _ in range(number):
            await asyncio.sleep(0)
            self.count += 1
            yield bits(self.count, torch.rand(()).item(), random.random())

    async def look(self) -> str:
        return bits(self.count)


@kind(num_clients=2)
class ContextVariable:
    """A context variable that a call sets and none resets."""

    def __init__(self, client_id: str) -> None:
        self.client_id = client_id

    def step(self) -> str:
        before = _tag.get()
        _tag.set(self.client_id)
        return bits(before)


@kind(num_clients=2)
class AsyncContextVariable:
    """A context variable that an async method sets and none resets."""

    def __init__(self, client_id: str) -> None:
        self.client_id = client_id

    async def step(self) -> str:
        before = _tag.get()
        _tag.set(self.client_id)
        await asyncio.sleep(0)
        return bits(before, _tag.get())


@kind(num_clients=2)
class NumpyErrors:
    """`np.seterr` without its end."""

    def __init__(self, client_id: str) -> None:
        self.count = 0

    def step(self) -> str:
        self.count += 1
        before = np.geterr()["under"]
        np.seterr(under="warn")
        return bits(self.count, before)


@kind(num_clients=2)
class DecimalPrecision:
    """The precision of `decimal`, set and not reset."""

    def __init__(self, client_id: str) -> None:
        self.share = decimal.Decimal(1)

    def step(self) -> str:
        self.share = self.share / 3
        decimal.getcontext().prec = 20
        return bits(self.share)


@kind("step", ask("wait", timeout_s=0.2), "step", "step")
class CutOff:
    """A call that is cut off by its deadline, and leaves what it did."""

    def __init__(self, client_id: str) -> None:
        self.log: list[str] = []

    def wait(self) -> None:
        self.log.append("begins")
        while not tfr.current_call().cancelled:
            torch.ones(10).sum()
        self.log.append("ends")

    def step(self) -> str:
        self.log.append("step")
        # On a busy machine the deadline may pass before the call begins: work that is cut off is no promise.
        num_steps = self.log.count("step")
        return bits(num_steps, len(self.log) in (num_steps, num_steps + 2))


@kind("step", ask("wait", timeout_s=0.2), "step", refused="'lock'")
class CutOffWithLock(CutOff):
    """The same of a learner that cannot be captured."""

    def __init__(self, client_id: str) -> None:
        import threading

        super().__init__(client_id)
        self.lock = threading.Lock()


@kind("fail", "step", "fail", "step")
class FailsOnTheWay:
    """A call that changes the learner and then raises."""

    def __init__(self, client_id: str) -> None:
        self.count = 0

    def fail(self) -> None:
        self.count += 1
        raise ValueError("on the way", self.count)

    def step(self) -> str:
        self.count += 1
        return bits(self.count)
