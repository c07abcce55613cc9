"""FedAvg as a plain loop in one process, without any framework: what the rounds of the others are compared with."""

from __future__ import annotations

import platform
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager

import torch
import workload
from protocol import Cannot, Measured, Repeat, serve


@asynccontextmanager
async def prepare(workloads: tuple[str, ...], quick: bool) -> AsyncIterator[Mapping[str, Repeat | Cannot]]:
    """``mlp`` and ``cnn``."""
    torch.set_num_threads(1)
    for client in range(workload.NUM_CLIENTS):
        workload.client_data(client)
    repeats: dict[str, Repeat | Cannot] = {}
    for kind in workloads:
        repeats[kind] = rounds(kind) if kind in ("mlp", "cnn") else Cannot(f"no {kind} here")
    yield repeats


def rounds(kind: str) -> Repeat:
    """Rounds with that model."""

    def repeat(count: int) -> Measured:
        weights, seconds = workload.initial_weights(kind), []
        for round_num in range(count):
            began = time.perf_counter()
            weights = workload.weighted_average(
                (workload.train_client(kind, weights, client), workload.NUM_SAMPLES)
                for client in workload.selected(round_num)
            )
            seconds.append(time.perf_counter() - began)
        return Measured(seconds, workload.fingerprint(weights))

    repeat(1)
    return repeat


if __name__ == "__main__":
    serve(prepare, {"torch": torch.__version__, "python": platform.python_version()})
