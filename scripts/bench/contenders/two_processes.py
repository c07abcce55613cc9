"""FedAvg with two worker processes and pipes, written by hand: each trains half of a round and sends one sum."""

from __future__ import annotations

import multiprocessing
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import torch
import workload
from protocol import Repeat, serve, warm_up

Arrays = dict[str, "np.ndarray[Any, Any]"]  # plain arrays: torch would put each tensor that is sent into a file


@asynccontextmanager
async def prepare(workloads: tuple[str, ...], quick: bool) -> AsyncIterator[Mapping[str, Repeat]]:
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
        known = {"mlp_two": "mlp", "cnn_two": "cnn"}
        repeats = {name: rounds(known[name], ends) for name in workloads if name in known}
        for repeat in repeats.values():
            await warm_up(repeat, 1)
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

    return workload.rounds(kind, a_round)


if __name__ == "__main__":
    serve(prepare, "torch")
