"""A learner whose methods draw numbers in tasks, callbacks and generators that they start."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import gc
import os
import random
import time
from collections.abc import AsyncIterator
from typing import Any

import numpy as np
import torch

import torchfedrpc as tfr

_are_training = 0  # sync methods that run in this process


def draw(client_id: str) -> float:
    """A number of all three generators, drawn in a call of this client, beside no sync method."""
    assert tfr.current_call().client_id == client_id
    assert not _are_training
    assert torch.is_grad_enabled()
    return float(torch.rand(1, dtype=torch.float64)) + float(np.random.rand()) + random.random()


class Tasking:
    """Draws in many ways."""

    def __init__(self, client_id: str) -> None:
        self.client_id = client_id
        self.drawn: list[float] = []
        self.left: asyncio.Task[Any] | None = None
        self.let_go: asyncio.Event | None = None

    def train(self, count: int) -> list[float]:
        """Draw as a sync method does, with a pause between two draws."""
        global _are_training
        _are_training += 1
        try:
            drawn = []
            for _ in range(count):
                time.sleep(0.002)
                drawn.append(float(torch.rand(1, dtype=torch.float64)) + random.random())
            return drawn
        finally:
            _are_training -= 1

    async def run(self, part: str) -> list[float]:
        self.drawn = []
        self.draw()
        await getattr(self, part)()
        self.draw()
        return self.drawn

    def draw(self) -> None:
        self.drawn.append(draw(self.client_id))

    async def draw_often(self, count: int, pause_s: float = 0.0) -> None:
        for _ in range(count):
            self.draw()
            await asyncio.sleep(pause_s)
        self.draw()

    # Parts.

    async def gathered(self) -> None:
        await asyncio.gather(*(self.draw_often(count) for count in range(4)))

    async def waited_for(self) -> None:
        await asyncio.wait_for(self.draw_often(3, 0.001), 30)

    async def timed_out(self) -> None:
        async def draw_at_last() -> None:
            try:
                self.draw()
                await asyncio.Event().wait()
            finally:
                self.draw()

        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(draw_at_last(), 0.01)

    async def nested(self) -> None:
        async def outer(depth: int) -> None:
            self.draw()
            if depth:
                await asyncio.create_task(outer(depth - 1))
            await asyncio.sleep(0)
            self.draw()

        async with asyncio.TaskGroup() as group:
            group.create_task(outer(3))
            group.create_task(outer(2))

    async def queued(self) -> None:
        queue: asyncio.Queue[int] = asyncio.Queue(1)

        async def produce() -> None:
            for number in range(3):
                self.draw()
                await queue.put(number)

        producing = asyncio.ensure_future(produce())
        for _ in range(3):
            await queue.get()
            self.draw()
        await producing

    async def called_back(self) -> None:
        loop, over = asyncio.get_running_loop(), asyncio.Event()
        loop.call_soon(self.draw)
        loop.call_later(0.001, self.draw)
        loop.call_soon_threadsafe(self.draw)
        future = loop.create_future()
        future.add_done_callback(lambda _: self.draw())
        loop.call_later(0.002, future.set_result, None)
        loop.call_later(0.004, over.set)
        await over.wait()

    async def read(self) -> None:
        loop, over = asyncio.get_running_loop(), asyncio.Event()
        ours, theirs = os.pipe()

        def take() -> None:
            os.read(ours, 1)
            self.draw()
            over.set()

        loop.add_reader(ours, take)
        os.write(theirs, b".")
        await over.wait()
        loop.remove_reader(ours)
        os.close(ours)
        os.close(theirs)

    async def own_context(self) -> None:
        loop, over = asyncio.get_running_loop(), asyncio.Event()

        async def wait() -> None:
            self.draw()
            await over.wait()
            self.draw()

        waiting = loop.create_task(wait(), context=contextvars.Context())
        await asyncio.sleep(0.001)
        over.set()
        await waiting

    async def dropped(self) -> None:
        """An async generator that is left in the middle, and one that only the garbage collector finds."""
        over: list[asyncio.Event] = [asyncio.Event(), asyncio.Event()]

        async def items(number: int) -> AsyncIterator[int]:
            try:
                yield number
                yield number
            finally:
                await asyncio.sleep(0)
                self.draw()
                over[number].set()

        async for _ in items(0):
            break
        await over[0].wait()
        circle: list[Any] = [items(1)]
        circle.append(circle)
        await anext(circle[0])
        del circle
        gc.collect()
        await over[1].wait()

    async def eager(self) -> None:
        loop = asyncio.get_running_loop()
        factory: Any = asyncio.eager_task_factory  # type: ignore[attr-defined]
        await asyncio.gather(*(factory(loop, self.draw_often(count)) for count in range(4)))

    # Tasks that outlive their call.

    async def leave(self) -> float:
        """Leave a task behind, which draws on request."""
        self.let_go, self.drawn = asyncio.Event(), []

        async def wait() -> None:
            assert self.let_go is not None
            await self.let_go.wait()
            await self.draw_often(2)

        self.left = asyncio.ensure_future(wait())
        await asyncio.sleep(0)
        return draw(self.client_id)

    async def finish(self) -> list[float]:
        """Let the task draw that was left behind, and draw as well."""
        assert self.let_go is not None
        assert self.left is not None
        self.let_go.set()
        own = [draw(self.client_id)]
        await self.left
        own.append(draw(self.client_id))
        return [*self.drawn, *own]


PARTS = [
    "gathered",
    "waited_for",
    "timed_out",
    "nested",
    "queued",
    "called_back",
    "read",
    "own_context",
    "dropped",
    "eager",
]
