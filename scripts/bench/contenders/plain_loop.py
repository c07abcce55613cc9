"""FedAvg as a plain loop in one process, without any framework: what the rounds of the others are compared with."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager

import torch
import workload
from protocol import Repeat, serve, warm_up
from workload import Weights


@asynccontextmanager
async def prepare(workloads: tuple[str, ...], quick: bool) -> AsyncIterator[Mapping[str, Repeat]]:
    """``mlp`` and ``cnn``."""
    torch.set_num_threads(1)
    for client in range(workload.NUM_CLIENTS):
        workload.client_data(client)
    repeats = {kind: rounds(kind) for kind in workloads if kind in ("mlp", "cnn")}
    for repeat in repeats.values():
        await warm_up(repeat, 1)
    yield repeats


def rounds(kind: str) -> Repeat:
    """Rounds with a model."""

    def a_round(weights: Weights, round_num: int) -> Weights:
        return workload.weighted_average(
            (workload.train_client(kind, weights, client), workload.NUM_SAMPLES)
            for client in workload.selected(round_num)
        )

    return workload.rounds(kind, a_round)


if __name__ == "__main__":
    serve(prepare, "torch")
