"""100,000 clients with a state each, of which 100 stay in memory: ``many`` in this process, ``many_two`` in workers.

A repetition is a round of 1,000 clients. Memory is that of the driver and its workers, after each round.
"""

from __future__ import annotations

import gc
import time
from collections import Counter
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager

import memory
import numpy as np
import torch
from protocol import Cannot, Measured, Repeat, serve

import torchfedrpc as tfr

NUM_CLIENTS = 100_000
NUM_SELECTED = 1000
NUM_RESIDENT = 100


class StatefulLearner:
    """A client with 1,000 numbers of its own."""

    def __init__(self, client_id: str) -> None:
        self.state = torch.zeros(1000)

    def step(self, by: float) -> float:
        """Add to all of them."""
        self.state += by
        return float(self.state.sum())


@asynccontextmanager
async def prepare(workloads: tuple[str, ...], quick: bool) -> AsyncIterator[Mapping[str, Repeat]]:
    """One workload. Of the time to open, with workers, that of a proxy of two clients is taken off: they start."""
    if workloads not in (("many",), ("many_two",)):
        raise Cannot("this serves many or many_two, one at a time")
    torch.set_num_threads(1)
    mode = "pseudo" if workloads == ("many_two",) else "local"
    runtime = {"execution_mode": mode, "num_processes": 2, "max_resident_learners": NUM_RESIDENT}
    few_s = 0.0
    if mode == "pseudo":
        began = time.perf_counter()
        async with tfr.LearnerProxy(StatefulLearner, ["a", "b"], runtime=runtime):
            few_s = time.perf_counter() - began
    client_ids = [f"client_{number}" for number in range(NUM_CLIENTS)]
    began = time.perf_counter()
    async with tfr.LearnerProxy(StatefulLearner, client_ids, runtime=runtime) as proxy:
        open_s = time.perf_counter() - began
        yield {workloads[0]: rounds(proxy, client_ids, open_s - few_s)}


def rounds(proxy: tfr.LearnerProxy, client_ids: list[str], opens_s: float) -> Repeat:
    """Rounds with other clients each time, and few that come again.

    Raises:
        RuntimeError: If a learner returns another result than that of its calls so far.
    """
    random, num_calls = np.random.default_rng(5), Counter[str]()

    async def repeat(count: int) -> Measured:
        seconds, resident_mb = [], []
        for _ in range(count):
            chosen = [client_ids[place] for place in random.choice(NUM_CLIENTS, NUM_SELECTED, replace=False)]
            began = time.perf_counter()
            results = await proxy.clients(chosen).call("step", 1.0)
            seconds.append(time.perf_counter() - began)
            num_calls.update(chosen)
            if any(result != 1000.0 * num_calls[client_id] for client_id, result in results.items()):
                raise RuntimeError("a learner has lost or repeated a call")
            gc.collect()
            resident_mb.append(memory.family_mb())
        settled_mb = resident_mb[min(1, count - 1)]
        growth = {
            "growth_mb": resident_mb[-1] - settled_mb,
            "growth_percent": 100 * (resident_mb[-1] / settled_mb - 1),
        }
        return Measured(
            seconds,
            "each learner has had all of its calls",
            {"opens_s": opens_s, "resident_mb": settled_mb, **growth},
        )

    return repeat


if __name__ == "__main__":
    serve(prepare, "torchfedrpc", "torch")
