"""The work without a framework: the copy of weights, FedAvg as a plain loop, and on two processes with pipes."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from multiprocessing.connection import Connection
from typing import Any

import torch
import workload
from protocol import Repeat, calling, serve
from workload import Arrays, Weights


@asynccontextmanager
async def prepare(workloads: tuple[str, ...]) -> AsyncIterator[Mapping[str, Repeat]]:
    """All workloads of calls that move weights, and all of FedAvg."""
    torch.set_num_threads(1)
    model, small = copying(workload.model_weights()), copying(workload.small_weights())
    repeats = {"push": model, "pull": model, "small": small}
    repeats |= {f"{kind}_eight": best_schedule(kind) for kind in workload.SLEEPS}
    repeats |= {kind: workload.rounds(kind, lambda *args, kind=kind: a_round(kind, *args)) for kind in workload.KINDS}
    if any(name.endswith("_two") for name in workloads):
        context = multiprocessing.get_context("spawn")
        pipes = [context.Pipe() for _ in range(workload.NUM_PROCESSES)]
        workers = [context.Process(target=work, args=(there,), daemon=True) for _, there in pipes]
        for worker, (_, there) in zip(workers, pipes, strict=True):
            worker.start()
            there.close()
        ends: list[Any] = [here for here, _ in pipes]

        def train(kind: str, arrays: Arrays, shares: list[list[int]]) -> list[Arrays]:
            for end, share in zip(ends, shares, strict=True):
                end.send((kind, arrays, share))
            return [end.recv() for end in ends]

        yield workload.rounds_by_hand(train)
        for end, worker in zip(ends, workers, strict=True):
            end.close()
            worker.join()
    else:
        workload.make_ready()
        yield repeats


def best_schedule(kind: str) -> Repeat:
    """``equal_eight`` or ``skewed_eight``, as if on eight workers: sleeps as long as the best schedule takes."""

    def a_round(round_num: int) -> int:
        time.sleep(workload.best_schedule_s(kind, round_num))
        return sum(workload.sleepers(kind, round_num))

    return workload.sleeping(kind, a_round)


def copying(weights: Weights) -> Repeat:
    """Copies weights into memory that is there already."""
    target = {name: torch.zeros_like(tensor) for name, tensor in weights.items()}

    def copy() -> None:
        for name, tensor in weights.items():
            target[name].copy_(tensor)

    return calling(copy, lambda _: workload.digest(target))


def a_round(kind: str, weights: Weights, round_num: int) -> Weights:
    """A round of FedAvg in one process."""
    clients = workload.selected(round_num)
    return workload.weighted_average(
        (workload.train_client(kind, weights, client), workload.NUM_SAMPLES) for client in clients
    )


def work(driver: Connection) -> None:
    """A worker: trains its half of each round's clients, until the driver ends."""
    workload.make_ready()
    while True:
        try:
            request = driver.recv()
        except EOFError:
            return
        driver.send(workload.train_share(*request))


if __name__ == "__main__":
    serve(prepare, "torch")
