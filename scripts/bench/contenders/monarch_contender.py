"""The calls and FedAvg with Monarch actors, by hand: two processes, with one actor and fifty learners on each.

What a practised user does is done. Weights travel as NumPy arrays, for which Monarch takes up to ten times less than
for tensors; they arrive writable, so that the receiver need not copy them. Endpoints are plain functions without
tracing, and many calls at once are waited for on a thread: both are faster than coroutines. In a round of FedAvg the
weights are sent to both actors by one call; each trains half of the clients and gives their average.

Further workloads: ``push_tensors``, ``pull_tensors`` and ``small_tensors`` pass the tensors as they are.
"""

from __future__ import annotations

import asyncio
import functools
import os
import pwd
import sys
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
import workload
from protocol import Cannot, Measured, Repeat, serve, timed, warm_up
from workload import Weights

os.environ["MONARCH_LOG_SUFFIX"] = uuid.uuid4().hex  # read once, by the import
from monarch.actor import Actor, current_rank, endpoint, shutdown_context, this_host

NUM_ACTORS = 2

Arrays = dict[str, "np.ndarray[Any, Any]"]
Mesh = Any  # of Workers


def as_arrays(weights: Weights) -> Arrays:
    """Weights as arrays on the same memory."""
    return {name: tensor.numpy() for name, tensor in weights.items()}


def as_weights(arrays: Arrays) -> Weights:
    """Arrays as weights on the same memory."""
    return {name: torch.from_numpy(array) for name, array in arrays.items()}


class Learner:
    """A learner; several share an actor."""

    def no_op(self) -> None:
        """Nothing."""


class Worker(Actor):
    """The actor."""

    def __init__(self) -> None:
        torch.set_num_threads(1)
        for client in range(workload.NUM_CLIENTS):
            workload.client_data(client)
        self.learners = [Learner() for _ in range(workload.NUM_GATHERED_LEARNERS // NUM_ACTORS)]
        self.kept = workload.model_weights()
        self.received: Weights = {}

    @endpoint(instrument=False)
    def no_op(self) -> None:
        """Nothing."""

    @endpoint(instrument=False)
    def no_op_of(self, learner: int) -> None:
        """Nothing, done by one of the learners."""
        return self.learners[learner].no_op()

    @endpoint(instrument=False)
    def push(self, arrays: Arrays) -> None:
        """Take weights and keep them until the next."""
        self.received = as_weights(arrays)

    @endpoint(instrument=False)
    def push_tensors(self, weights: Weights) -> None:
        """The same with tensors."""
        self.received = weights

    @endpoint(instrument=False)
    def received_digest(self) -> str:
        """Of what was pushed last."""
        return workload.digest(self.received)

    @endpoint(instrument=False)
    def pull(self) -> Arrays:
        """Give the worker's own weights."""
        return as_arrays(self.kept)

    @endpoint(instrument=False)
    def pull_tensors(self) -> Weights:
        """The same with tensors."""
        return self.kept

    @endpoint(instrument=False)
    def train(self, kind: str, arrays: Arrays, shares: list[list[int]]) -> Arrays:
        """Train this actor's share of the clients from the same weights and give their average."""
        weights = as_weights(arrays)
        return as_arrays(
            workload.weighted_average(
                (workload.train_client(kind, weights, client), workload.NUM_SAMPLES)
                for client in shares[current_rank().rank]
            )
        )


@asynccontextmanager
async def actors() -> AsyncIterator[Mesh]:
    """The two actors."""
    os.environ["PYTHONPATH"] = os.pathsep.join(sys.path)  # they import `workload`
    processes: Any = this_host().spawn_procs(per_host={"places": NUM_ACTORS})
    try:
        yield processes.spawn("worker", Worker)
    finally:
        await processes.stop()
        await shutdown_context()


def remove_log() -> None:
    """Remove the log that Monarch begins when it is imported, in a folder that cannot be chosen."""
    folder = Path("/tmp") / pwd.getpwuid(os.getuid()).pw_name
    for log in folder.glob(f"*{os.environ['MONARCH_LOG_SUFFIX']}*"):
        log.unlink()
    with suppress(OSError):  # others' logs are there
        folder.rmdir()


@asynccontextmanager
async def prepare(workloads: tuple[str, ...], quick: bool) -> AsyncIterator[Mapping[str, Repeat]]:
    """All but FedAvg in one process."""
    torch.set_num_threads(1)
    if not set(workloads) - {"mlp", "cnn"}:
        raise Cannot("actors of Monarch have processes of their own: see the rounds on two workers")
    async with actors() as workers:
        large, small = workload.model_weights(), workload.small_weights()
        one = workers.slice(places=0)
        known: dict[str, Repeat] = {
            "noop": functools.partial(repeat_no_op, one),
            "gathered": functools.partial(repeat_gathered, workers),
            "push": functools.partial(repeat_push, one, lambda: one.push.call_one(as_arrays(large))),
            "push_tensors": functools.partial(repeat_push, one, lambda: one.push_tensors.call_one(large)),
            "small": functools.partial(repeat_push, one, lambda: one.push.call_one(as_arrays(small))),
            "small_tensors": functools.partial(repeat_push, one, lambda: one.push_tensors.call_one(small)),
            "pull": functools.partial(repeat_pull, lambda: pull(one)),
            "pull_tensors": functools.partial(repeat_pull, one.pull_tensors.call_one),
            "mlp_two": rounds(workers, "mlp"),
            "cnn_two": rounds(workers, "cnn"),
        }
        for name in workloads:
            if name in known:
                await warm_up(known[name], 3)
        yield known


async def repeat_no_op(worker: Mesh, count: int) -> Measured:
    """``noop``."""
    seconds, result = await timed(worker.no_op.call_one, count)
    return Measured(seconds, str(result))


async def repeat_gathered(workers: Mesh, count: int) -> Measured:
    """``gathered``."""
    endpoints = [workers.slice(places=place).no_op_of for place in range(NUM_ACTORS)]

    async def gathered() -> list[object]:
        learners = [divmod(number % workload.NUM_GATHERED_LEARNERS, NUM_ACTORS) for number in numbers]
        futures = [endpoints[place].call_one(learner) for learner, place in learners]
        return await asyncio.to_thread(lambda: [future.get() for future in futures])

    numbers = range(workload.NUM_GATHERED_CALLS)
    seconds, results = await timed(gathered, count)
    return Measured(seconds, str(results[-1]))


async def repeat_push(worker: Mesh, call: Callable[[], Awaitable[object]], count: int) -> Measured:
    """``push`` and its like."""
    seconds, _ = await timed(call, count)
    return Measured(seconds, await worker.received_digest.call_one())


async def pull(worker: Mesh) -> Weights:
    """Weights that are this process's own."""
    return as_weights(await worker.pull.call_one())


async def repeat_pull(call: Callable[[], Awaitable[Weights]], count: int) -> Measured:
    """``pull`` and its like."""
    seconds, weights = await timed(call, count)
    return Measured(seconds, workload.digest(weights))


def rounds(workers: Mesh, kind: str) -> Repeat:
    """``mlp_two`` and ``cnn_two``."""

    async def a_round(weights: Weights, round_num: int) -> Weights:
        chosen = workload.selected(round_num)
        shares = [chosen[place::NUM_ACTORS] for place in range(NUM_ACTORS)]
        results = await workers.train.call(kind, as_arrays(weights), shares)
        return workload.weighted_average(
            (as_weights(result), len(shares[point.rank]) * workload.NUM_SAMPLES) for point, result in results.items()
        )

    return workload.rounds(kind, a_round)


if __name__ == "__main__":
    try:
        serve(prepare, "torchmonarch", "torch")
    finally:
        remove_log()
