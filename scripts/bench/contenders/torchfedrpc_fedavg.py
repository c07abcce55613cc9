"""FedAvg by torchfedrpc, as its users write it: ``mlp``, ``cnn`` in this process, ``mlp_two``, ``cnn_two`` on two."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any

import torch
import workload
from protocol import Cannot, Repeat, serve, warm_up
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


def rounds(proxy: tfr.LearnerProxy, kind: str) -> Repeat:
    """Rounds through an open proxy."""

    async def a_round(weights: Weights, round_num: int) -> Weights:
        cohort = proxy.clients([f"client_{client + 1}" for client in workload.selected(round_num)])
        reduced = await cohort.reduce("train_epoch", tfr.WeightedMean(), kind=kind, weights=weights)
        average: Weights = reduced.value
        return average

    return workload.rounds(kind, a_round)


@asynccontextmanager
async def prepare(workloads: tuple[str, ...], quick: bool) -> AsyncIterator[Mapping[str, Repeat]]:
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
        repeats = {name: rounds(proxy, name.removesuffix("_two")) for name in workloads}
        for repeat in repeats.values():
            await warm_up(repeat, 1 if quick else 2)
        yield repeats


if __name__ == "__main__":
    serve(prepare, "torchfedrpc", "torch")
