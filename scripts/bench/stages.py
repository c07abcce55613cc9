"""Print where the time of a round goes: before the first training, between two, and after the last one.

A round is that of the row ``mlp_two`` of the table: 20 of 100 clients train an MLP on two workers. Clocks of one
machine agree, so the workers note when each training begins and ends, and give these times afterwards.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import statistics
import time
from collections.abc import Iterable
from typing import Any

import torch
import workload
from workload import Weights

import torchfedrpc as tfr

NUM_WARM_ROUNDS = 20
TARGETS_MS = {
    "before the first training": 1.0,
    "between two trainings on a worker": 0.15,
    "from the last training to the result": 1.5,
    "CPU of the driver": 2.0,
}

times: list[tuple[float, float]] = []  # in a worker: when each training began and ended


class Client:
    """A client of FedAvg that notes when it trains."""

    stateless = True

    def __init__(self, client_id: str) -> None:
        self.number = int(client_id.removeprefix("client_")) - 1

    def make_ready(self) -> None:
        """Make the data of all clients."""
        workload.make_ready()

    def train_epoch(self, weights: Weights) -> dict[str, Any]:
        """One local epoch from the given weights."""
        began = time.perf_counter()
        trained = workload.train_client("mlp", weights, self.number)
        times.append((began, time.perf_counter()))
        return {"model_weights": trained, "num_samples": workload.NUM_SAMPLES}

    def take_times(self) -> list[tuple[float, float]]:
        """The times since they were taken last."""
        taken = times.copy()
        times.clear()
        return taken


class StickyClient(Client):
    """The same, on a worker of its own."""

    stateless = False


async def measure(learner: type, num_rounds: int) -> dict[str, list[float]]:
    """The stages of each round, in milliseconds."""
    torch.set_num_threads(1)
    stages: dict[str, list[float]] = {name: [] for name in (*TARGETS_MS, "a round")}
    runtime = {"execution_mode": "pseudo", "num_processes": 2, "num_clients": workload.NUM_CLIENTS}
    async with tfr.LearnerProxy(learner, runtime=runtime) as proxy:
        client_ids, weights = proxy.client_ids, workload.initial_weights("mlp")
        for _ in range(3):
            await proxy.clients().call("make_ready")
        for round_num in range(NUM_WARM_ROUNDS + num_rounds):
            cohort = proxy.clients([client_ids[client] for client in workload.selected(round_num)])
            began, cpu = time.perf_counter(), time.process_time()
            reduced = await cohort.reduce("train_epoch", tfr.WeightedMean(), weights=weights)
            ended, cpu = time.perf_counter(), time.process_time() - cpu
            weights = dict(reduced.value)
            of_workers = [one for one in (await proxy.clients().call("take_times")).values() if one]
            if round_num >= NUM_WARM_ROUNDS:
                note(stages, began, ended, cpu, of_workers)
    return stages


def note(
    stages: dict[str, list[float]],
    began: float,
    ended: float,
    cpu: float,
    of_workers: list[list[tuple[float, float]]],
) -> None:
    """Add the stages of a round."""
    first = min(begin for own in of_workers for begin, _ in own)
    last = max(end for own in of_workers for _, end in own)
    gaps = [following[0] - own[1] for part in of_workers for own, following in itertools.pairwise(part)]
    values: Iterable[float] = (first - began, statistics.median(gaps), ended - last, cpu, ended - began)
    for name, value in zip(stages, values, strict=True):
        stages[name].append(value * 1e3)


def main() -> None:
    """Run the rounds, and print the stages."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=100)
    num_rounds = parser.parse_args().rounds
    for learner in (Client, StickyClient):
        kind = "with state" if learner is StickyClient else "stateless"
        print(f"{kind}: milliseconds, median and mean of {num_rounds} rounds")
        for name, values in asyncio.run(measure(learner, num_rounds)).items():
            target = f"  target {TARGETS_MS[name]:g}" if name in TARGETS_MS else ""
            print(f"  {name:40} {statistics.median(values):7.2f} {statistics.fmean(values):7.2f}{target}")


if __name__ == "__main__":
    main()
