"""FedAvg by torchfedrpc, as its users write it: ``mlp``, ``cnn`` in this process, ``mlp_two``, ``cnn_two`` on two.

Sums are formed on the workers by ``reduce``; a library that has none gathers results and averages them in the driver.
"""

from __future__ import annotations

import platform
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any

import torch
import workload
from protocol import Cannot, Measured, Repeat, serve
from workload import Weights

import torchfedrpc as tfr


class FedAvgLearner:
    """A client of FedAvg."""

    def __init__(self, client_id: str) -> None:
        self.number = int(client_id.removeprefix("client_")) - 1
        workload.client_data(self.number)

    def ready(self) -> None:
        """Nothing; a first call makes the learner."""

    def train_epoch(self, kind: str, weights: Weights) -> dict[str, Any]:
        """One local epoch from the given weights."""
        trained = workload.train_client(kind, weights, self.number)
        return {"model_weights": trained, "num_samples": workload.NUM_SAMPLES}


class Rounds:
    """Rounds of FedAvg through an open proxy."""

    def __init__(self, proxy: tfr.LearnerProxy, kind: str) -> None:
        self.proxy = proxy
        self.kind = kind

    async def repeat(self, count: int) -> Measured:
        """So many rounds."""
        weights, seconds = workload.initial_weights(self.kind), []
        for round_num in range(count):
            began = time.perf_counter()
            weights = await self.a_round(weights, round_num)
            seconds.append(time.perf_counter() - began)
        return Measured(seconds, workload.fingerprint(weights))

    async def a_round(self, weights: Weights, round_num: int) -> Weights:
        """The weights after a round."""
        cohort = self.proxy.clients([f"client_{client + 1}" for client in workload.selected(round_num)])
        average: Weights
        if hasattr(tfr, "WeightedMean"):
            reduced = await cohort.reduce("train_epoch", tfr.WeightedMean(), kind=self.kind, weights=weights)
            average = reduced.value
            return average
        results = await cohort.train_epoch(kind=self.kind, weights=weights)
        return workload.weighted_average((one["model_weights"], one["num_samples"]) for one in results.values())


@asynccontextmanager
async def prepare(workloads: tuple[str, ...], quick: bool) -> AsyncIterator[Mapping[str, Repeat | Cannot]]:
    """All workloads on one proxy."""
    torch.set_num_threads(1)
    known = ("mlp", "cnn"), ("mlp_two", "cnn_two")
    served = next((names for names in known if set(workloads) <= set(names)), None)
    if served is None:
        raise Cannot(f"this serves {' or '.join(map(','.join, known))}, not {','.join(workloads)}")
    mode = "pseudo" if served[0].endswith("_two") else "local"
    runtime = {"execution_mode": mode, "num_clients": workload.NUM_CLIENTS, "num_processes": 2}
    async with tfr.LearnerProxy(FedAvgLearner, runtime=runtime) as proxy:
        await proxy.clients().call("ready")
        repeats: dict[str, Repeat | Cannot] = {}
        for name in workloads:
            repeats[name] = repeat = Rounds(proxy, name.removesuffix("_two")).repeat
            await repeat(1 if quick else 2)
        yield repeats


if __name__ == "__main__":
    serve(
        prepare,
        {"torchfedrpc": tfr.__version__, "torch": torch.__version__, "python": platform.python_version()},
    )
