"""FedAvg with Flower's simulation engine: `run_simulation` with 100 nodes on two actors of one CPU each.

One simulation serves the whole run, so that its start is in no round; a request starts Flower's own FedAvg strategy
in it anew, with the clients of each round chosen as everywhere. The time of a round is that between two evaluations
of the strategy's function for the server, which does nothing but look at the clock. Nodes have random numbers in
Flower: they are asked once which client they are. `run_simulation` is called deprecated in favour of the command
``flwr run``, which runs the same engine, but prints no times and takes its data and the rest from an app in a folder.

The local training is `workload.train_client`. Flower averages in NumPy, so that weights agree but for rounding. Its
engine looks for new messages every 0.1 s, on either side, which is most of a small round.
"""

from __future__ import annotations

import asyncio
import functools
import itertools
import logging
import os
import queue
import secrets
import tempfile
import threading
import time
from collections.abc import AsyncIterator, Iterable, Mapping
from concurrent.futures import Future
from contextlib import asynccontextmanager
from typing import Any

import torch
import workload
from protocol import Cannot, Measured, Repeat, serve

os.environ["FLWR_TELEMETRY_ENABLED"] = "0"  # read by the import
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MessageType, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from flwr.simulation import run_simulation

NUM_ACTORS = 2
START_TIMEOUT_S = 120.0

Request = tuple[str, int, "Future[Measured]"]
Nodes = dict[int, int]  # client -> node


def make_ready() -> None:
    """In an actor; the first time makes what rounds are not to pay for."""
    torch.set_num_threads(1)
    for client in range(workload.NUM_CLIENTS):
        workload.client_data(client)


def client_app() -> ClientApp:
    """What a node does."""
    app = ClientApp()

    @app.query()
    def which(message: Message, context: Context) -> Message:
        client = int(context.node_config["partition-id"])
        return Message(RecordDict({"client": MetricRecord({"number": client})}), reply_to=message)

    @app.train()
    def train(message: Message, context: Context) -> Message:
        make_ready()
        weights = message.content.array_records["arrays"].to_torch_state_dict()
        kind = str(message.content.config_records["config"]["kind"])
        trained = workload.train_client(kind, weights, int(context.node_config["partition-id"]))
        counted = MetricRecord({"num-examples": workload.NUM_SAMPLES})
        return Message(RecordDict({"arrays": ArrayRecord(trained), "metrics": counted}), reply_to=message)

    return app


class FedAvgOfChosen(FedAvg):
    """Flower's FedAvg with the clients that all contenders take."""

    def __init__(self, nodes: Nodes) -> None:
        super().__init__(fraction_evaluate=0.0)
        self._nodes = nodes

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Flower's rounds are counted from 1."""
        content = RecordDict({self.arrayrecord_key: arrays, self.configrecord_key: config})
        chosen = [self._nodes[client] for client in workload.selected(server_round - 1)]
        return [Message(content, message_type=MessageType.TRAIN, dst_node_id=node) for node in chosen]

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Refuses a round that lacks a client, which Flower would only log."""
        replies = list(replies)
        failed = [str(reply.error.reason) for reply in replies if reply.has_error()]
        if failed or len(replies) != workload.NUM_SELECTED:
            raise RuntimeError(f"round {server_round}: {len(replies)} replies, of which failed: {failed}")
        aggregated: tuple[ArrayRecord | None, MetricRecord | None] = super().aggregate_train(server_round, replies)
        return aggregated


def repeat_rounds(grid: Grid, nodes: Nodes, kind: str, count: int) -> Measured:
    """``mlp_two`` and ``cnn_two``, on the server's thread."""
    times: list[float] = []
    result = FedAvgOfChosen(nodes).start(
        grid,
        ArrayRecord(workload.initial_weights(kind)),
        num_rounds=count,
        train_config=ConfigRecord({"kind": kind}),
        evaluate_fn=lambda server_round, arrays: times.append(time.perf_counter()),
    )
    seconds = [after - before for before, after in itertools.pairwise(times)]
    return Measured(seconds, workload.fingerprint(result.arrays.to_torch_state_dict()))


def nodes_of_clients(grid: Grid) -> Nodes:
    """Ask all nodes which client they are."""
    deadline = time.monotonic() + START_TIMEOUT_S
    while len(nodes := list(grid.get_node_ids())) < workload.NUM_CLIENTS:
        if time.monotonic() > deadline:
            raise TimeoutError(f"{len(nodes)} of {workload.NUM_CLIENTS} nodes after {START_TIMEOUT_S} s")
        time.sleep(0.1)
    asked = [Message(RecordDict(), message_type=MessageType.QUERY, dst_node_id=node) for node in nodes]
    replies = list(grid.send_and_receive(asked, timeout=START_TIMEOUT_S))
    for reply in replies:
        if reply.has_error():
            raise RuntimeError(f"a node failed: {reply.error.reason}")
    numbers: list[Any] = [reply.content.metric_records["client"]["number"] for reply in replies]
    found = {number: reply.metadata.src_node_id for number, reply in zip(numbers, replies, strict=True)}
    if len(found) < workload.NUM_CLIENTS:
        raise RuntimeError(f"{len(found)} of {workload.NUM_CLIENTS} nodes told their number")
    return found


class Simulation:
    """A simulation that waits for requests, on a thread."""

    def __init__(self) -> None:
        self._requests: queue.Queue[Request | None] = queue.Queue()
        self._failed = ""
        self._thread = threading.Thread(target=self._run, name="simulation")
        self._thread.start()

    async def repeat(self, kind: str, count: int) -> Measured:
        """Do so many rounds.

        Raises:
            Cannot: The simulation has ended.
        """
        measured: Future[Measured] = Future()
        self._requests.put((kind, count, measured))
        while not measured.done():
            if not self._thread.is_alive():
                raise Cannot(self._failed or "the simulation ended by itself")
            await asyncio.sleep(0.05)
        return measured.result()

    def close(self) -> None:
        """End it; takes some seconds."""
        self._requests.put(None)
        self._thread.join()

    def _run(self) -> None:
        server = ServerApp()

        @server.main()
        def main(grid: Grid, context: Context) -> None:
            self._serve(grid)

        with tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as folder:
            os.environ["FLWR_HOME"] = folder
            of_ray: dict[str, Any] = {"address": "local", "num_cpus": NUM_ACTORS, "_temp_dir": folder}
            config: dict[str, Any] = {"init_args": of_ray, "client_resources": {"num_cpus": 1, "num_gpus": 0.0}}
            try:
                run_simulation(server, client_app(), num_supernodes=workload.NUM_CLIENTS, backend_config=config)
            except Exception as error:
                self._failed = f"{type(error).__name__}: {error}"

    def _serve(self, grid: Grid) -> None:
        nodes = nodes_of_clients(grid)
        while request := self._requests.get():
            kind, count, measured = request
            try:
                measured.set_result(repeat_rounds(grid, nodes, kind, count))
            except Exception as error:
                measured.set_exception(error)


@asynccontextmanager
async def prepare(workloads: tuple[str, ...]) -> AsyncIterator[Mapping[str, Repeat]]:
    """FedAvg on two actors."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))  # else Ray may write one into the home directory
    torch.set_num_threads(1)
    logging.getLogger("flwr").setLevel(logging.WARNING)
    known = {"mlp_two": "mlp", "cnn_two": "cnn"}
    if not set(workloads) & set(known):
        raise Cannot("its engine's clients run in actors, which are processes: see the rounds on two workers")
    repeats: dict[str, Repeat] = {}
    simulation = Simulation()
    try:
        for name in set(workloads) & set(known):
            repeats[name] = functools.partial(simulation.repeat, known[name])
            await simulation.repeat(known[name], 2)
        yield repeats
    finally:
        await asyncio.to_thread(simulation.close)


if __name__ == "__main__":
    serve(prepare, "flwr", "ray", "torch")
