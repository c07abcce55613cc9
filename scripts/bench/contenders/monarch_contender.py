"""The calls and FedAvg with Monarch actors, see actors.py.

Arrays arrive writable, so that the receiver need not copy them. Endpoints are plain functions without tracing, and
many calls at once are waited for on a thread: both are faster than coroutines. In a round of FedAvg the weights are
sent to both actors by one call.
"""

from __future__ import annotations

import asyncio
import os
import pwd
import sys
import uuid
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import actors
import workload
from protocol import Repeat, serve
from workload import Arrays

os.environ["MONARCH_LOG_SUFFIX"] = uuid.uuid4().hex  # read once, by the import
from monarch.actor import Actor, current_rank, endpoint, shutdown_context, this_host

untraced: Any = endpoint(instrument=False)


class Worker(actors.Worker, Actor):
    """The actor."""

    no_op = untraced(actors.Worker.no_op)
    no_op_of = untraced(actors.Worker.no_op_of)
    push = untraced(actors.Worker.push)
    received_digest = untraced(actors.Worker.received_digest)
    pull = untraced(actors.Worker.pull)

    @untraced
    def train_shares(self, kind: str, arrays: Arrays, shares: list[list[int]]) -> Arrays:
        """Train this actor's share of the clients."""
        return workload.train_share(kind, arrays, shares[current_rank().rank])


def remove_log() -> None:
    """Remove the log that Monarch begins when it is imported, in a folder that cannot be chosen."""
    folder = Path("/tmp") / pwd.getpwuid(os.getuid()).pw_name
    for log in folder.glob(f"*{os.environ['MONARCH_LOG_SUFFIX']}*"):
        log.unlink()
    with suppress(OSError):  # others' logs are there
        folder.rmdir()


@asynccontextmanager
async def prepare(workloads: tuple[str, ...]) -> AsyncIterator[Mapping[str, Repeat]]:
    """Two actors."""
    actors.refuse_local(workloads)
    os.environ["PYTHONPATH"] = os.pathsep.join(sys.path)  # the actors import `actors`
    processes: Any = this_host().spawn_procs(per_host={"places": actors.NUM_ACTORS})
    try:
        workers = processes.spawn("worker", Worker)
        places = [workers.slice(places=place) for place in range(actors.NUM_ACTORS)]

        def call(method: str, *args: object) -> Any:
            return getattr(places[0], method).call_one(*args)

        async def many(learners: list[tuple[int, int]]) -> list[object]:
            endpoints = [place.no_op_of for place in places]
            futures = [endpoints[place].call_one(learner) for place, learner in learners]
            return await asyncio.to_thread(lambda: [future.get() for future in futures])

        async def train(kind: str, arrays: Arrays, shares: list[list[int]]) -> list[Arrays]:
            results = await workers.train_shares.call(kind, arrays, shares)
            by_rank = {point.rank: result for point, result in results.items()}
            return [by_rank[rank] for rank in range(actors.NUM_ACTORS)]

        yield actors.calls(call, many, workload.as_weights, train)
    finally:
        await processes.stop()
        await shutdown_context()


if __name__ == "__main__":
    try:
        serve(prepare, "torchmonarch", "torch")
    finally:
        remove_log()
