"""The calls and FedAvg with Ray actors, see actors.py.

Ray writes arrays once into its shared memory and maps them where they are read; a receiver copies them into
tensors, as they are read-only. Many calls at once are fetched by one ``ray.get``, which is faster than asyncio's
``gather`` of them. In a round of FedAvg the weights are put into the shared memory once.
"""

from __future__ import annotations

import os
import secrets
import tempfile
import warnings
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any

import actors
import ray
import torch
from protocol import Repeat, repeated, serve
from workload import Arrays, Weights

NUM_WARM_UP = 10  # pages of the shared memory are slow the first time that they are written


def copied(arrays: Arrays) -> Weights:
    """A copy of arrays as weights."""
    return {name: torch.tensor(array) for name, array in arrays.items()}


class Worker(actors.Worker):
    """The actor."""

    def __init__(self) -> None:
        super().__init__()
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")  # it is only read

    def push(self, arrays: Arrays) -> None:
        """Take a copy of weights and keep it until the next."""
        self.received = copied(arrays)


@asynccontextmanager
async def prepare(workloads: tuple[str, ...]) -> AsyncIterator[Mapping[str, Repeat]]:
    """A Ray for this program alone with two actors."""
    actors.refuse_local(workloads)
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))  # else Ray writes one into the home directory
    with tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as folder:
        ray.init(
            address="local",
            num_cpus=actors.NUM_ACTORS,
            include_dashboard=False,
            object_store_memory=10**9,
            _temp_dir=folder,
        )
        try:
            remote: Any = ray.remote(num_cpus=1)(Worker)
            workers = [remote.remote() for _ in range(actors.NUM_ACTORS)]

            def call(method: str, *args: object) -> Any:
                return getattr(workers[0], method).remote(*args)

            def many(learners: list[tuple[int, int]]) -> Any:
                return ray.get([workers[place].no_op_of.remote(learner) for place, learner in learners])

            def train(kind: str, arrays: Arrays, shares: list[list[int]]) -> list[Arrays]:
                put, pairs = ray.put(arrays), zip(workers, shares, strict=True)
                averages: list[Arrays] = ray.get([worker.train.remote(kind, put, share) for worker, share in pairs])
                return averages

            known = actors.calls(call, many, copied, train)
            for name in set(workloads) & {"push", "pull", "small"}:
                await repeated(known[name], NUM_WARM_UP)
            yield known
        finally:
            ray.shutdown()


if __name__ == "__main__":
    serve(prepare, "ray", "torch")
