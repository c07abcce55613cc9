"""FedAvg with pfl-research's simulation: `FederatedAveraging` over a `SimulatedBackend`, in one process or on two.

The local training is pfl's own: it takes the same steps as `workload.train_client`, and averages differences instead
of weights, so that the results agree but for rounding. Batches of a client are cut once, as pfl does by itself. What
a process is in a run is fixed when pfl is imported; therefore a run on two processes starts this program twice more,
each time as one of the two ranks, and sends both the same requests. pfl runs an event loop, so that it has a separate
thread. The time of a round is that between two of its callbacks.
"""

from __future__ import annotations

import asyncio
import functools
import itertools
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, asynccontextmanager, contextmanager
from typing import IO, Any

import numpy as np
import torch
import workload
from pfl.aggregate.simulate import SimulatedBackend
from pfl.aggregate.weighting import WeightByDatapoints
from pfl.algorithm.base import NNAlgorithmParams
from pfl.algorithm.federated_averaging import FederatedAveraging
from pfl.callback.base import TrainingProcessCallback
from pfl.data.dataset import Dataset
from pfl.data.federated_dataset import FederatedDataset
from pfl.hyperparam import NNTrainHyperParams
from pfl.metrics import Metrics
from pfl.model.pytorch import PyTorchModel
from protocol import Measured, Repeat, serve
from torch import Tensor, nn

NUM_RANKS = 2
RANK, ADDRESSES = "PFL_WORKER_RANK", "PFL_WORKER_ADDRESSES"  # as pfl reads them


class ModelOfPfl(nn.Module):
    """A model with the two methods that pfl asks for."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.model = workload.make_model(kind)

    def loss(self, images: Tensor, labels: Tensor) -> Tensor:
        """What a local step makes less."""
        return nn.functional.cross_entropy(self.model(images), labels)

    def metrics(self, images: Tensor, labels: Tensor) -> dict[str, Any]:
        """Nothing: pfl asks for them before and after the training of each client in round 0."""
        return {}


class Clock(TrainingProcessCallback):
    """Takes the time of each round."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def on_train_begin(self, *, model: Any) -> Any:
        """Before round 0."""
        self.times.append(time.perf_counter())
        return Metrics()

    def after_central_iteration(self, aggregate_metrics: Any, model: Any, *, central_iteration: int) -> Any:
        """After a round; False lets the next begin."""
        self.times.append(time.perf_counter())
        return False, Metrics()

    def seconds(self) -> list[float]:
        """Of each round."""
        return [after - before for before, after in itertools.pairwise(self.times)]


@functools.cache
def dataset_of(client: int) -> Any:
    """A client's data as pfl has it."""
    return Dataset(raw_data=workload.client_data(client), user_id=str(client))


def repeat_rounds(kind: str, count: int) -> Measured:
    """All workloads; on two processes both run this and pfl shares out the clients."""
    np.random.seed(5)  # equal in all processes, as pfl wants
    model = ModelOfPfl(kind)
    model.model.load_state_dict(workload.initial_weights(kind))
    in_turn = (client for round_num in itertools.count() for client in workload.selected(round_num))
    clients = FederatedDataset(dataset_of, functools.partial(next, in_turn))
    clock = Clock()
    FederatedAveraging().run(
        algorithm_params=NNAlgorithmParams(
            central_num_iterations=count,
            evaluation_frequency=count,
            train_cohort_size=workload.NUM_SELECTED,
            val_cohort_size=None,
        ),
        backend=SimulatedBackend(clients, clients, postprocessors=[WeightByDatapoints()]),
        model=PyTorchModel(model, torch.optim.SGD, torch.optim.SGD(model.parameters(), lr=1.0)),
        model_train_params=NNTrainHyperParams(
            local_num_epochs=1,
            local_learning_rate=workload.LEARNING_RATE,
            local_batch_size=workload.BATCH_SIZE,
        ),
        callbacks=[clock],
        send_metrics_to_platform=False,
    )
    return Measured(clock.seconds(), workload.fingerprint(dict(model.model.state_dict())))


def own_loop() -> None:
    """Give this thread a loop that does not run, as pfl wants it."""
    torch.set_num_threads(1)
    asyncio.set_event_loop(asyncio.new_event_loop())


@asynccontextmanager
async def prepare(workloads: tuple[str, ...]) -> AsyncIterator[Mapping[str, Repeat]]:
    """All of FedAvg."""
    torch.set_num_threads(1)
    for client in range(workload.NUM_CLIENTS):
        dataset_of(client)
    known = {"mlp": "mlp", "cnn": "cnn", "mlp_two": "mlp", "cnn_two": "cnn"}
    on_two = [name for name in workloads if name.endswith("_two") and name in known and RANK not in os.environ]
    repeats: dict[str, Repeat] = {}
    with ExitStack() as stack:
        ranks = stack.enter_context(two_ranks(on_two)) if on_two else []
        thread = stack.enter_context(ThreadPoolExecutor(1, initializer=own_loop))

        async def repeat_here(kind: str, count: int) -> Measured:
            return await asyncio.get_running_loop().run_in_executor(thread, repeat_rounds, kind, count)

        for name in set(workloads) & set(known):
            if name in on_two:
                repeats[name] = functools.partial(ask_ranks, ranks, name)
            else:
                repeats[name] = functools.partial(repeat_here, known[name])
        yield repeats


class RankProcess:
    """This program as one of two ranks."""

    def __init__(self, rank: int, port: int, workloads: list[str]) -> None:
        addresses = ",".join(f"127.0.0.1:{port}" for _ in range(NUM_RANKS))  # pfl takes the first, and their number
        environment = os.environ | {RANK: str(rank), ADDRESSES: addresses, "GLOO_SOCKET_IFNAME": "lo"}
        self._process = subprocess.Popen(
            [sys.executable, __file__, ",".join(workloads)],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def tell(self, line: str) -> None:
        """Write a line."""
        stdin = _opened(self._process.stdin)
        stdin.write(line + "\n")
        stdin.flush()

    def answer(self) -> dict[str, Any]:
        """Read a line.

        Raises:
            RuntimeError: If it has ended or failed.
        """
        line = _opened(self._process.stdout).readline()
        answer: dict[str, Any] = json.loads(line) if line else {"failed": "it ended"}
        if "failed" in answer:
            raise RuntimeError(f"a rank failed: {answer['failed']}")
        return answer

    def close(self) -> None:
        """End it."""
        _opened(self._process.stdin).close()
        try:
            self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        _opened(self._process.stdout).close()


def _opened(stream: IO[str] | None) -> IO[str]:
    assert stream is not None
    return stream


@contextmanager
def two_ranks(workloads: list[str]) -> Iterator[list[RankProcess]]:
    """Two processes of a run, ready for these workloads."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with ExitStack() as stack:
        ranks = []
        for rank in range(NUM_RANKS):
            ranks.append(RankProcess(rank, port, workloads))
            stack.callback(ranks[-1].close)
        for process in ranks:
            process.answer()
        yield ranks


def ask_ranks(ranks: list[RankProcess], name: str, count: int) -> Measured:
    """Rounds by both; rank 0 is heard."""
    for process in ranks:
        process.tell(f"{name} {count}")
    answers = [process.answer() for process in ranks]
    return Measured(**answers[0])


if __name__ == "__main__":
    serve(prepare, "pfl", "torch")
