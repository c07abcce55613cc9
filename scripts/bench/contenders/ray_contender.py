"""The calls and FedAvg with Ray actors, by hand: two actors, each a process, with fifty learners on each.

What a practised user does is done. Weights travel as NumPy arrays, which Ray writes once into its shared memory and
maps where they are read; a receiver copies them into tensors of its own, as they are read-only. Many calls at once
are fetched by one ``ray.get``, which is faster than asyncio's ``gather`` of them. In a round of FedAvg the weights
are put into the shared memory once, and an actor trains half of the clients in one call and gives their average.

Further workloads: ``push_tensors``, ``pull_tensors`` and ``small_tensors`` pass the tensors as they are.
``push_anew`` passes arrays that the receiver keeps where Ray has put them, and ``push_shared`` arrays that were put
there before.
"""

from __future__ import annotations

import functools
import os
import secrets
import tempfile
import warnings
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from typing import Any

import numpy as np
import ray
import torch
import workload
from protocol import Cannot, Measured, Repeat, serve, timed, timed_plain, warm_up
from workload import Weights

NUM_ACTORS = 2
NUM_WARM_UP = 10  # pages of the shared memory are slow the first time that they are written

Arrays = dict[str, "np.ndarray[Any, Any]"]
Actor = Any  # a handle to a Worker


def as_arrays(weights: Weights) -> Arrays:
    """Weights as arrays on the same memory."""
    return {name: tensor.numpy() for name, tensor in weights.items()}


def as_weights(arrays: Arrays) -> Weights:
    """A copy of arrays as weights."""
    return {name: torch.tensor(array) for name, array in arrays.items()}


class Learner:
    """A learner; several share an actor."""

    def no_op(self) -> None:
        """Nothing."""


class Worker:
    """The actor."""

    def __init__(self) -> None:
        torch.set_num_threads(1)
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")  # it is only read
        for client in range(workload.NUM_CLIENTS):
            workload.client_data(client)
        self.learners = [Learner() for _ in range(workload.NUM_GATHERED_LEARNERS // NUM_ACTORS)]
        self.kept = workload.model_weights()
        self.received: Weights = {}

    def no_op(self) -> None:
        """Nothing."""

    def no_op_of(self, learner: int) -> None:
        """Nothing, done by one of the learners."""
        return self.learners[learner].no_op()

    def push(self, arrays: Arrays) -> None:
        """Take weights and keep them until the next."""
        self.received = as_weights(arrays)

    def push_tensors(self, weights: Weights) -> None:
        """The same with tensors, of which Ray has made a copy."""
        self.received = weights

    def push_read_only(self, arrays: Arrays) -> None:
        """The same without a copy."""
        self.received = {name: torch.from_numpy(array) for name, array in arrays.items()}

    def received_digest(self) -> str:
        """Of what was pushed last."""
        return workload.digest(self.received)

    def pull(self) -> Arrays:
        """Give the worker's own weights."""
        return as_arrays(self.kept)

    def pull_tensors(self) -> Weights:
        """The same with tensors."""
        return self.kept

    def train(self, kind: str, arrays: Arrays, clients: list[int]) -> Arrays:
        """Train clients from the same weights and give their average."""
        weights = as_weights(arrays)
        return as_arrays(
            workload.weighted_average(
                (workload.train_client(kind, weights, client), workload.NUM_SAMPLES) for client in clients
            )
        )


@contextmanager
def actors() -> Iterator[list[Actor]]:
    """A Ray of this program's own with the two actors on it."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))  # else Ray writes one into the home directory
    with tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as folder:
        ray.init(
            address="local",
            num_cpus=NUM_ACTORS,
            include_dashboard=False,
            object_store_memory=10**9,
            _temp_dir=folder,
        )
        try:
            remote: Any = ray.remote(num_cpus=1)(Worker)
            yield [remote.remote() for _ in range(NUM_ACTORS)]
        finally:
            ray.shutdown()


@asynccontextmanager
async def prepare(workloads: tuple[str, ...], quick: bool) -> AsyncIterator[Mapping[str, Repeat]]:
    """All but FedAvg in one process."""
    torch.set_num_threads(1)
    if not set(workloads) - {"mlp", "cnn"}:
        raise Cannot("an actor of Ray is a process of its own: see the rounds on two workers")
    with actors() as workers:
        large, small = workload.model_weights(), workload.small_weights()
        shared, one = ray.put(as_arrays(large)), workers[0]
        known: dict[str, Repeat] = {
            "noop": functools.partial(repeat_no_op, one),
            "gathered": functools.partial(repeat_gathered, workers),
            "push": functools.partial(repeat_push, one, lambda: one.push.remote(as_arrays(large))),
            "push_tensors": functools.partial(repeat_push, one, lambda: one.push_tensors.remote(large)),
            "push_anew": functools.partial(repeat_push, one, lambda: one.push_read_only.remote(as_arrays(large))),
            "push_shared": functools.partial(repeat_push, one, lambda: one.push_read_only.remote(shared)),
            "small": functools.partial(repeat_push, one, lambda: one.push.remote(as_arrays(small))),
            "small_tensors": functools.partial(repeat_push, one, lambda: one.push_tensors.remote(small)),
            "pull": functools.partial(repeat_pull, lambda: pull(one)),
            "pull_tensors": functools.partial(repeat_pull, one.pull_tensors.remote),
            "mlp_two": rounds(workers, "mlp"),
            "cnn_two": rounds(workers, "cnn"),
        }
        for name in workloads:
            num_warm_up = NUM_WARM_UP if name.startswith(("push", "pull", "small")) else 2
            if name in known:
                await warm_up(known[name], num_warm_up)
        yield known


async def repeat_no_op(worker: Actor, count: int) -> Measured:
    """``noop``."""
    seconds, result = await timed(worker.no_op.remote, count)
    return Measured(seconds, str(result))


def repeat_gathered(workers: list[Actor], count: int) -> Measured:
    """``gathered``."""

    def gathered() -> list[object]:
        learners = [divmod(number % workload.NUM_GATHERED_LEARNERS, NUM_ACTORS) for number in numbers]
        results: list[object] = ray.get([workers[place].no_op_of.remote(learner) for learner, place in learners])
        return results

    numbers = range(workload.NUM_GATHERED_CALLS)
    seconds, results = timed_plain(gathered, count)
    return Measured(seconds, str(results[-1]))


async def repeat_push(worker: Actor, call: Callable[[], Awaitable[object]], count: int) -> Measured:
    """``push`` and its like."""
    seconds, _ = await timed(call, count)
    return Measured(seconds, await worker.received_digest.remote())


async def pull(worker: Actor) -> Weights:
    """Weights that are this process's own."""
    return as_weights(await worker.pull.remote())


async def repeat_pull(call: Callable[[], Awaitable[Weights]], count: int) -> Measured:
    """``pull`` and its like."""
    seconds, weights = await timed(call, count)
    return Measured(seconds, workload.digest(weights))


def rounds(workers: list[Actor], kind: str) -> Repeat:
    """``mlp_two`` and ``cnn_two``."""

    def a_round(weights: Weights, round_num: int) -> Weights:
        chosen = workload.selected(round_num)
        shares = [chosen[place::NUM_ACTORS] for place in range(NUM_ACTORS)]
        arrays = ray.put(as_arrays(weights))
        results: list[Arrays] = ray.get(
            [worker.train.remote(kind, arrays, share) for worker, share in zip(workers, shares, strict=True)]
        )
        return workload.weighted_average(
            (as_weights(result), len(share) * workload.NUM_SAMPLES)
            for result, share in zip(results, shares, strict=True)
        )

    return workload.rounds(kind, a_round)


if __name__ == "__main__":
    serve(prepare, "ray", "torch")
