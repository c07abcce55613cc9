"""FedAvg with two worker processes and pipes, written by hand: each trains half of a round and sends one sum."""

from __future__ import annotations

import multiprocessing
import platform
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import torch
import workload
from protocol import Cannot, Measured, Repeat, serve

Arrays = dict[str, "np.ndarray[Any, Any]"]  # plain arrays: torch would put each tensor that is sent into a file


@asynccontextmanager
async def prepare(workloads: tuple[str, ...], quick: bool) -> AsyncIterator[Mapping[str, Repeat | Cannot]]:
    """``mlp_two`` and ``cnn_two``."""
    torch.set_num_threads(1)
    context = multiprocessing.get_context("spawn")
    pipes = [context.Pipe() for _ in range(2)]
    workers = [context.Process(target=work, args=(there,), daemon=True) for _, there in pipes]
    for worker in workers:
        worker.start()
    for _, there in pipes:
        there.close()
    ends: list[Any] = [here for here, _ in pipes]
    try:
        repeats: dict[str, Repeat | Cannot] = {}
        for name in workloads:
            kind = name.removesuffix("_two")
            known = name in ("mlp_two", "cnn_two")
            repeats[name] = rounds(kind, ends) if known else Cannot(f"no {name} here")
        yield repeats
    finally:
        for end in ends:
            end.close()
        for worker in workers:
            worker.join()


def work(driver: Connection) -> None:
    """A worker: half of each round's clients, until the driver is gone."""
    torch.set_num_threads(1)
    for client in range(workload.NUM_CLIENTS):
        workload.client_data(client)
    while True:
        try:
            kind, arrays, clients = driver.recv()
        except EOFError:
            return
        weights = {name: torch.from_numpy(array) for name, array in arrays.items()}
        average = workload.weighted_average(
            (workload.train_client(kind, weights, client), workload.NUM_SAMPLES) for client in clients
        )
        driver.send((as_arrays(average), len(clients) * workload.NUM_SAMPLES))


def as_arrays(weights: workload.Weights) -> Arrays:
    """Weights as arrays on the same memory."""
    return {name: tensor.numpy() for name, tensor in weights.items()}


def rounds(kind: str, workers: list[Connection]) -> Repeat:
    """Rounds with that model."""

    def a_round(weights: workload.Weights, round_num: int) -> workload.Weights:
        chosen = workload.selected(round_num)
        for number, worker in enumerate(workers):
            worker.send((kind, as_arrays(weights), chosen[number :: len(workers)]))
        received = [worker.recv() for worker in workers]
        return workload.weighted_average(
            ({name: torch.from_numpy(array) for name, array in arrays.items()}, num_samples)
            for arrays, num_samples in received
        )

    def repeat(count: int) -> Measured:
        weights, seconds = workload.initial_weights(kind), []
        for round_num in range(count):
            began = time.perf_counter()
            weights = a_round(weights, round_num)
            seconds.append(time.perf_counter() - began)
        return Measured(seconds, workload.fingerprint(weights))

    repeat(1)
    return repeat


if __name__ == "__main__":
    serve(prepare, {"torch": torch.__version__, "python": platform.python_version()})
