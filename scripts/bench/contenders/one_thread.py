"""FedAvg with awaited calls of one thread in this process, written by hand: what a call costs there at the least.

Each call has its own copy of the weights, and the event loop stays free, as with any library of awaited calls.
"""

from __future__ import annotations

import asyncio
import platform
import queue
import threading
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any

import torch
import workload
from protocol import Cannot, Measured, Repeat, serve

Job = tuple["asyncio.Future[workload.Weights]", str, workload.Weights, int]


class Lane:
    """A thread that trains one client after another."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._jobs: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    async def train(self, kind: str, weights: workload.Weights, client: int) -> workload.Weights:
        """As `workload.train_client`, on the thread."""
        future: asyncio.Future[workload.Weights] = self._loop.create_future()
        self._jobs.put((future, kind, weights, client))
        return await future

    def close(self) -> None:
        """End the thread."""
        self._jobs.put(None)
        self._thread.join()

    def _run(self) -> None:
        torch.set_num_threads(1)
        while (job := self._jobs.get()) is not None:
            future, kind, weights, client = job
            own = {name: tensor.clone() for name, tensor in weights.items()}
            trained = workload.train_client(kind, own, client)
            self._loop.call_soon_threadsafe(future.set_result, trained)


@asynccontextmanager
async def prepare(workloads: tuple[str, ...], quick: bool) -> AsyncIterator[Mapping[str, Repeat | Cannot]]:
    """``mlp`` and ``cnn``."""
    torch.set_num_threads(1)
    for client in range(workload.NUM_CLIENTS):
        workload.client_data(client)
    lane = Lane()
    try:
        repeats: dict[str, Repeat | Cannot] = {}
        for kind in workloads:
            repeats[kind] = rounds(lane, kind)
            await repeats[kind](1)  # type: ignore[operator, misc]
        yield repeats
    finally:
        lane.close()


def rounds(lane: Lane, kind: str) -> Repeat:
    """Rounds with that model."""

    async def a_round(weights: workload.Weights, round_num: int) -> workload.Weights:
        calls = [lane.train(kind, weights, client) for client in workload.selected(round_num)]
        results: list[Any] = await asyncio.gather(*calls)
        return workload.weighted_average((trained, workload.NUM_SAMPLES) for trained in results)

    async def repeat(count: int) -> Measured:
        weights, seconds = workload.initial_weights(kind), []
        for round_num in range(count):
            began = time.perf_counter()
            weights = await a_round(weights, round_num)
            seconds.append(time.perf_counter() - began)
        return Measured(seconds, workload.fingerprint(weights))

    return repeat


if __name__ == "__main__":
    serve(prepare, {"torch": torch.__version__, "python": platform.python_version()})
