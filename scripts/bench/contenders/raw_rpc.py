"""The calls by torch.distributed.rpc alone: the least that one can write, on the transport that torchfedrpc uses."""

from __future__ import annotations

import asyncio
import concurrent.futures
import functools
import os
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from typing import Any

import torch
import torch.distributed.rpc as rpc
import workload
from protocol import Measured, Repeat, calling, serve, timed
from torch.distributed import TCPStore  # type: ignore[attr-defined]
from workload import Weights

received: Weights = {}  # on a worker: the weights that were pushed last
stocked: list[Weights] = []  # on a worker: the weights that ``pull_given`` gives


def no_op() -> None:
    """Nothing."""


@functools.cache
def thread() -> concurrent.futures.Executor:
    """On a worker: a thread for long calls, so that those of RPC are free."""
    return concurrent.futures.ThreadPoolExecutor(1)


@rpc.functions.async_execution  # type: ignore[untyped-decorator]
def no_op_on_thread() -> Any:
    """The same as `no_op` on the worker's own thread."""
    future: torch.futures.Future[None] = torch.futures.Future()
    thread().submit(lambda: future.set_result(no_op()))  # type: ignore[func-returns-value]
    return future


def push(weights: Weights) -> None:
    """Take weights and keep them until the next."""
    global received
    received = weights


def received_digest() -> str:
    """Of the weights that were pushed last."""
    return workload.digest(received)


@functools.cache
def kept() -> Weights:
    """The worker's own weights."""
    return workload.model_weights()


def pull() -> Weights:
    """Give the worker's own weights; no copy is taken."""
    return kept()


def stock(count: int) -> None:
    """Make the weights that so many ``pull_given`` give."""
    stocked[:] = [{name: tensor.clone() for name, tensor in kept().items()} for _ in range(count)]


def pull_given() -> Weights:
    """Give weights away."""
    return stocked.pop()


async def bridged(worker: str, function: Callable[..., object], *args: object) -> Any:
    """The least that awaits an rpc_async: one callback, one hop to the loop."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[object] = loop.create_future()
    sent = rpc.rpc_async(worker, function, args=args, timeout=0)
    sent.add_done_callback(lambda done: loop.call_soon_threadsafe(future.set_result, done.value()))
    return await future


def join(rank: int, world_size: int, port: int) -> None:
    """Join the world."""
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), TP_SOCKET_IFNAME="lo", GLOO_SOCKET_IFNAME="lo")
    options = rpc.TensorPipeRpcBackendOptions(num_worker_threads=4, _transports=["uv"], _channels=["cma", "basic"])
    rpc.init_rpc(f"raw{rank}", rank=rank, world_size=world_size, rpc_backend_options=options)


def work(rank: int, world_size: int, port: int) -> None:
    """A worker, until rank 0 leaves."""
    join(rank, world_size, port)
    rpc.shutdown()


@contextmanager
def world(num_workers: int) -> Iterator[None]:
    """This process as rank 0, and so many workers."""
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    port = store.port
    del store
    context = torch.multiprocessing.get_context("spawn")
    ranks = range(1, num_workers + 1)
    workers = [context.Process(target=work, args=(rank, num_workers + 1, port), daemon=True) for rank in ranks]
    for worker in workers:
        worker.start()
    join(0, num_workers + 1, port)
    try:
        yield
    finally:
        rpc.shutdown()
        for worker in workers:
            worker.join()


@asynccontextmanager
async def prepare(workloads: tuple[str, ...]) -> AsyncIterator[Mapping[str, Repeat]]:
    """All workloads that are calls."""
    model, small = workload.model_weights(), workload.small_weights()
    with world(2 if "gathered" in workloads else 1):
        call = functools.partial(bridged, "raw1")
        yield {
            "noop": calling(lambda: call(no_op), str),
            "noop_on_thread": calling(lambda: call(no_op_on_thread), str),
            "gathered": calling(pipelined, lambda results: str(results[-1])),
            "push": calling(lambda: call(push, model), lambda _: call(received_digest)),
            "small": calling(lambda: call(push, small), lambda _: call(received_digest)),
            "pull": calling(lambda: call(pull), workload.digest),
            "pull_given": repeat_pull_given,
        }


def pipelined() -> list[object]:
    """``gathered``: all are sent before the first answer is waited for; a worker has no learners here."""
    workers = [f"raw{1 + number % 2}" for number in range(workload.NUM_GATHERED_CALLS)]
    return list(torch.futures.wait_all([rpc.rpc_async(worker, no_op, timeout=0) for worker in workers]))


async def repeat_pull_given(count: int) -> Measured:
    """``pull_given``: the weights are made before the time is taken."""
    await bridged("raw1", stock, count)
    seconds, weights = await timed(lambda: bridged("raw1", pull_given), count)
    return Measured(seconds, workload.digest(weights))


if __name__ == "__main__":
    serve(prepare, "torch")
