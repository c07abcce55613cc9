"""Overhead of a call: an awaited no-op and a 40 MB state dict, against raw bridged rpc_async in the same run.

Both sides run in worker processes of this machine, on the same transport, interleaved; printed are medians.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import platform
import statistics
import time
from collections.abc import Awaitable, Callable

import torch
import torch.distributed.rpc as rpc

import torchfedrpc as tfr

Weights = dict[str, torch.Tensor]


def some_weights() -> Weights:
    """A state dict of 40 MB: ten float32 tensors of shape (1000, 1000)."""
    return {f"layer{number}": torch.full((1000, 1000), float(number)) for number in range(10)}


class BenchLearner:
    """Does nothing, so that the calls themselves are measured; also serves the raw side's functions."""

    def __init__(self, client_id: str) -> None:
        self.weights = some_weights()

    def no_op(self) -> None:
        """Nothing."""

    def push(self, weights: Weights) -> None:
        """Take weights."""

    def pull(self) -> Weights:
        """Give the live weights; the caller is owed a copy."""
        return self.weights


def raw_no_op() -> None:
    """The raw side of `BenchLearner.no_op`."""


def raw_push(weights: Weights) -> None:
    """The raw side of `BenchLearner.push`."""


_raw_weights: Weights = {}


def raw_pull() -> Weights:
    """The raw side of `BenchLearner.pull`; no copy is taken."""
    if not _raw_weights:
        _raw_weights.update(some_weights())
    return _raw_weights


async def bridged(worker: str, function: Callable[..., object], *args: object) -> object:
    """The least that awaits an rpc_async: one callback, one hop to the loop."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[object] = loop.create_future()
    sent = rpc.rpc_async(worker, function, args=args, timeout=0)
    sent.add_done_callback(lambda done: loop.call_soon_threadsafe(future.set_result, done.value()))
    return await future


def raw_world(rank: int, port: int, commands: torch.multiprocessing.SimpleQueue, results: object) -> None:
    """One process of the raw world; rank 0 measures on command."""
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), TP_SOCKET_IFNAME="lo", GLOO_SOCKET_IFNAME="lo")
    options = rpc.TensorPipeRpcBackendOptions(num_worker_threads=4, _transports=["uv"], _channels=["mpt_uv", "basic"])
    rpc.init_rpc(f"raw{rank}", rank=rank, world_size=2, rpc_backend_options=options)
    if rank == 0:
        weights = some_weights()
        measures = {
            "no_op": lambda: bridged("raw1", raw_no_op),
            "push": lambda: bridged("raw1", raw_push, weights),
            "pull": lambda: bridged("raw1", raw_pull),
        }
        with asyncio.Runner() as runner:
            while (command := commands.get()) is not None:
                name, repetitions = command
                results.put(runner.run(timed(measures[name], repetitions)))  # type: ignore[attr-defined]
    rpc.shutdown()


async def timed(call: Callable[[], Awaitable[object]], repetitions: int) -> float:
    """Median seconds of an awaited call."""
    seconds = []
    for _ in range(repetitions):
        began = time.perf_counter()
        await call()
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds)


async def measure(rounds: int, scale: float, raw: Callable[[str, int], float]) -> None:
    """Interleave both sides and print the table."""
    repetitions = {"no_op": int(400 * scale), "push": int(20 * scale), "pull": int(20 * scale)}
    ratios: dict[str, list[float]] = {name: [] for name in repetitions}
    ours: dict[str, list[float]] = {name: [] for name in repetitions}
    runtime = {"execution_mode": "pseudo", "num_processes": 1}
    async with tfr.LearnerProxy(BenchLearner, ["client_1"], runtime=runtime) as proxy:
        learner, weights = proxy.client("client_1"), some_weights()
        calls = {
            "no_op": lambda: learner.no_op(),
            "push": lambda: learner.push(weights),
            "pull": lambda: learner.pull(),
        }
        for call in calls.values():
            await timed(call, 3)
        for _ in range(rounds):
            for name, call in calls.items():
                theirs = raw(name, repetitions[name])
                ours[name].append(await timed(call, repetitions[name]))
                ratios[name].append(ours[name][-1] / theirs)
    print(f"{'':24}{'torchfedrpc':>14}{'/ raw RPC':>11}{'min':>7}{'max':>7}")
    for name, label in (("no_op", "awaited no-op"), ("push", "40 MB to the learner"), ("pull", "40 MB from it")):
        milliseconds, all_ratios = 1e3 * statistics.median(ours[name]), ratios[name]
        print(
            f"{label:24}{milliseconds:11.3f} ms{statistics.median(all_ratios):11.2f}"
            f"{min(all_ratios):7.2f}{max(all_ratios):7.2f}"
        )


def main() -> None:
    """Measure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="some seconds instead of a minute")
    quick = parser.parse_args().quick
    torch.set_num_threads(1)
    print(f"torch {torch.__version__}, Python {platform.python_version()}, {os.cpu_count()} cores, uv transport")
    context = torch.multiprocessing.get_context("spawn")
    commands, results = context.SimpleQueue(), context.SimpleQueue()
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    port = store.port
    del store
    members = [context.Process(target=raw_world, args=(rank, port, commands, results)) for rank in (0, 1)]
    for member in members:
        member.start()

    def raw(name: str, repetitions: int) -> float:
        commands.put((name, repetitions))
        return float(results.get())

    try:
        for name in ("no_op", "push", "pull"):
            raw(name, 3)
        asyncio.run(measure(3 if quick else 7, 0.25 if quick else 1.0, raw))
    finally:
        commands.put(None)
        for member in members:
            member.join()


if __name__ == "__main__":
    main()
