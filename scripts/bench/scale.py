"""Measure the driver's CPU per call with 8, 32 and 128 workers that are simulated, up to a stub for torch RPC.

Everything of the driver is real but `rpc_async`. The stub runs the calls of each worker one after another, as a clock
says, and gives the answers that workers give. Its own CPU time is not counted. What RPC itself costs the driver is
measured once, as the difference between an awaited call on a real worker and on a simulated one, and added for each
request and answer.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import time
from collections import deque
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import torch

import torchfedrpc as tfr
from torchfedrpc.executors.base import ExecutorSpec
from torchfedrpc.executors.call_executor import CallExecutor
from torchfedrpc.executors.stateless import StatelessLearners
from torchfedrpc.host.call import Call, Outcome
from torchfedrpc.reduce.worker import BatchJob
from torchfedrpc.rpc import worker_client
from torchfedrpc.rpc.member import Member
from torchfedrpc.rpc.message import outcome_message, read_batch, read_call
from torchfedrpc.rpc.worker_client import Traffic, WorkerClient
from torchfedrpc.wire.allowlist import AllowList
from torchfedrpc.wire.packing import pack

ROOT = Path(__file__).resolve().parent.parent.parent
NUM_WORKERS = (8, 32, 128)
CALLS_PER_WORKER = 10
CALL_S = 0.02
NUM_ROUNDS = 12
NUM_WARM_ROUNDS = 2
NUM_AWAITED = 300
CPU = torch.device("cpu")
ALLOW = AllowList([__name__])
RESULT = {"model_weights": {"bias": torch.zeros(10)}, "num_samples": 1}

_GIVEN_BACK = Outcome("given_back", never_ran=True)


class Client:
    """What real workers run."""

    stateless = True

    def __init__(self, client_id: str) -> None:
        pass

    def train_epoch(self, weights: dict[str, torch.Tensor] | None = None) -> dict[str, Any]:
        """Give a result."""
        return RESULT


# The stub.


class Meter:
    """Counts the CPU seconds of the stub, and the messages.

    Attributes:
        stub_s: CPU seconds of this thread in the stub.
        num_messages: Requests and answers.
    """

    def __init__(self) -> None:
        self.stub_s = 0.0
        self.num_messages = 0
        self._depth = 0

    @contextmanager
    def in_stub(self) -> Iterator[None]:
        """Count the CPU time of a block, unless it is inside another."""
        began, self._depth = time.thread_time(), self._depth + 1
        try:
            yield
        finally:
            self._depth -= 1
            if not self._depth:
                self.stub_s += time.thread_time() - began


METER = Meter()


@dataclass
class Job:
    """A call that waits or runs on a simulated worker."""

    call: Call
    question: int | None
    batch: BatchJob | None = None
    place: int = 0


class Future:
    """An answer of RPC."""

    def __init__(self) -> None:
        self._callback: Callable[[Future], object] | None = None
        self._is_done = False
        self._value: Any = None

    def add_done_callback(self, callback: Callable[[Future], object]) -> None:
        """Call it with this future once there is an answer."""
        self._callback = callback
        if self._is_done:
            asyncio.get_running_loop().call_soon(callback, self)

    def wait(self) -> Any:
        """The answer."""
        return self._value

    def settle(self, value: Any) -> None:
        """Answer, outside of the stub."""
        self._value, self._is_done = value, True
        METER.num_messages += 1
        if self._callback is not None:
            asyncio.get_running_loop().call_soon(self._callback, self)


class Worker:
    """A simulated worker: an endpoint, and calls that end by the clock."""

    def __init__(self) -> None:
        self._jobs: deque[Job] = deque()
        self._is_running = False
        self._open: deque[Future] = deque()
        self._ready: list[tuple[int, Any]] = []
        self._batches: dict[int, tuple[int, BatchJob]] = {}
        self._number = 0
        self._known: set[str] = set()

    def serve(self, items: Any) -> Future:
        """Take a request."""
        with METER.in_stub():
            future = Future()
            self._open.append(future)
            for verb, *arguments in items:
                getattr(self, f"_{verb}", self._nothing)(*arguments)
            self._answer()
            return future

    def _nothing(self, *arguments: Any) -> None:
        """Registrations and shared values change nothing here."""

    def _submit(self, question: int, message: Any) -> None:
        call, _ = read_call(message, CPU)
        self._put(Job(call, question))

    def _batch(self, question: int, message: Any) -> None:
        batch, _ = read_batch(message, CPU)
        job = BatchJob(batch, ALLOW, by_value=True)
        self._batches[batch.call_id] = question, job
        for place, call in batch.calls:
            self._put(Job(call, None, job, place))

    def _take_back(self, question: int, call_id: int, candidates: tuple[int, ...], half: bool) -> None:
        waiting = [job for job in self._jobs if job.call.call_id in candidates]
        taken = waiting[len(waiting) // 2 if half else 0 :]
        for job in taken:
            self._jobs.remove(job)
        ids = tuple((job.call.call_id, _GIVEN_BACK) for job in taken)
        self._ready.append((question, outcome_message(Outcome("value", of_calls=ids), frozenset())))
        for job in taken:
            self._end(job, _GIVEN_BACK)

    def _put(self, job: Job) -> None:
        self._jobs.append(job)
        self._next()

    def _next(self) -> None:
        if not self._is_running and self._jobs:
            self._is_running = True
            asyncio.get_running_loop().call_later(CALL_S, self._done, self._jobs.popleft())

    def _done(self, job: Job) -> None:
        with METER.in_stub():
            self._is_running = False
            if job.batch is not None:
                job.batch.add(job.place, RESULT)
                self._end(job, Outcome("value", seconds=CALL_S))
            else:
                self._end(job, Outcome("value", pack(RESULT), seconds=CALL_S))
            self._next()
            self._answer()

    def _end(self, job: Job, outcome: Outcome) -> None:
        if job.batch is None:
            assert job.question is not None
            self._ready.append((job.question, outcome_message(outcome, frozenset())))
        elif job.batch.ended(job.place, outcome):
            question, batch = self._batches.pop(job.batch.batch.call_id)
            final = Outcome("value", batch.partial_results(), of_calls=tuple(batch.outcomes))
            self._ready.append((question, outcome_message(final, frozenset())))

    def _answer(self) -> None:
        if self._ready and self._open:
            ready, self._ready = self._ready, []
            number, self._number = self._number, self._number + 1
            self._open.popleft().settle((number, ready, []))


class Rpc:
    """In place of torch.distributed.rpc."""

    def __init__(self) -> None:
        self._workers: dict[str, Worker] = {}

    def get_worker_info(self, name: str) -> Worker:
        """A worker by its name."""
        return self._workers.setdefault(name, Worker())

    def rpc_async(self, worker: Worker, entry: Any, args: tuple[Any, ...], timeout: float) -> Any:
        """Send a request."""
        METER.num_messages += 1
        if len(args) == 1:  # acknowledgements
            future = Future()
            future.settle(None)
            return future
        return worker.serve(args[1])


class SimulatedLearners(StatelessLearners):
    """Learners on simulated workers."""

    def __init__(self, config: tfr.RuntimeConfig, spec: ExecutorSpec, durations: Any) -> None:
        super().__init__(config, spec, [], durations)
        self._events: asyncio.Queue[Any] = asyncio.Queue()

    async def open(self) -> None:
        """Let all workers accept calls."""
        rpc = Rpc()
        worker_client.torch_rpc = lambda: rpc  # type: ignore[attr-defined]
        source: Any = type("Source", (), {"replaces": False})()
        for number in range(1, (self._config.num_processes or 1) + 1):
            member = Member(f"worker{number}", link=None, machine="here")  # type: ignore[arg-type]
            member.begin()
            self._workers.enlist(self._workers.admit(source, member))
            member.enter_world(
                WorkerClient(
                    member.label,
                    member.label,
                    b"",
                    frozenset(),
                    Traffic(),
                    events=self._events,
                    sees_files=False,
                    pid=None,
                    suspects=(),
                )
            )
        self._workers.serve()

    async def close(self, reason: str) -> None:
        """End the run."""
        self._run.end()
        self._workers.close()
        await self._run.close()
        self._file_pool.close()

    def stats(self) -> dict[str, Any]:
        """No numbers."""
        return {}


@tfr.executor("simulated")
class SimulatedExecutor(CallExecutor):
    """The mode of the simulation."""

    def _make_learners(self, spec: ExecutorSpec) -> SimulatedLearners:
        return SimulatedLearners(self.config, spec, self._durations)


# What is measured.


@dataclass(frozen=True)
class Cost:
    """CPU milliseconds of the driver for each call, without RPC, and the messages for each call."""

    cpu_ms: float
    num_messages: float


async def cost(repeat: Callable[[], Awaitable[object]], num_calls: int, num_rounds: int) -> Cost:
    """The cost of a call."""
    costs = []
    for _ in range(num_rounds):
        METER.stub_s, METER.num_messages, began = 0.0, 0, time.process_time()
        await repeat()
        costs.append((time.process_time() - began - METER.stub_s, METER.num_messages))
    kept = costs[NUM_WARM_ROUNDS:] if num_rounds > NUM_WARM_ROUNDS else costs
    return Cost(
        statistics.median(seconds for seconds, _ in kept) / num_calls * 1e3,
        statistics.median(messages for _, messages in kept) / num_calls,
    )


async def awaited(runtime: dict[str, Any]) -> Cost:
    """The cost of an awaited call of one worker."""
    async with tfr.LearnerProxy(Client, ["client_1"], runtime=runtime) as proxy:

        async def several() -> None:
            for _ in range(NUM_AWAITED):
                await proxy.train_epoch("client_1")

        return await cost(several, NUM_AWAITED, 4)


async def group_cost(num_workers: int, name: str) -> Cost:
    """The cost of a call of a group."""
    num_calls = num_workers * CALLS_PER_WORKER
    weights = {"weight": torch.zeros(50_000)}
    runtime = {"execution_mode": "simulated", "num_processes": num_workers, "num_clients": num_calls}
    async with tfr.LearnerProxy(Client, runtime=runtime) as proxy:
        everyone = proxy.clients()

        async def call() -> object:
            if name == "reduce":
                return await everyone.reduce("train_epoch", tfr.WeightedMean(), weights=weights)
            return await everyone.train_epoch(weights=weights)

        return await cost(call, num_calls, NUM_ROUNDS)


def draw(costs: dict[tuple[int, str], Cost], message_ms: float, path: Path) -> None:
    """Draw the CPU time of a call, by the number of workers and the way the call is made."""
    figure, panel = plt.subplots(figsize=(8, 3.6), constrained_layout=True)
    rows = [f"{name}, {num_workers} workers" for num_workers, name in costs]
    own = [of_call.cpu_ms for of_call in costs.values()]
    rpc = [of_call.num_messages * message_ms for of_call in costs.values()]
    panel.barh(rows, own, color="#4477aa", label="torchfedrpc")
    panel.barh(rows, rpc, left=own, color="#ccbb44", label="torch RPC")
    panel.invert_yaxis()
    panel.set_xlabel("CPU milliseconds of the driver for each call")
    panel.legend(frameon=False)
    figure.savefig(path, dpi=110)


def main() -> None:
    """Measure, print a table, and draw it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workers", type=int, nargs="+", default=NUM_WORKERS)
    parser.add_argument("--picture", type=Path, default=ROOT / "docs" / "scale.png")
    options = parser.parse_args()
    torch.set_num_threads(1)
    real = asyncio.run(awaited({"execution_mode": "pseudo", "num_processes": 1}))
    global CALL_S
    call_s, CALL_S = CALL_S, 0.0
    simulated = asyncio.run(awaited({"execution_mode": "simulated", "num_processes": 1}))
    CALL_S = call_s
    message_ms = (real.cpu_ms - simulated.cpu_ms) / simulated.num_messages
    print(f"awaited call: {real.cpu_ms:.3f} ms of CPU; without RPC {simulated.cpu_ms:.3f} ms")
    print(f"RPC: {message_ms:.3f} ms of CPU for each request or answer\n")
    print(
        f"{'workers':>8} {'calls':>6} {'':12} {'CPU ms':>8} {'messages':>9} {'with RPC':>9} {'calls/s at most':>16}"
    )
    costs: dict[tuple[int, str], Cost] = {}
    for name in ("reduce", "group call"):
        for num_workers in options.workers:
            of_call = costs[num_workers, name] = asyncio.run(group_cost(num_workers, name))
            whole_ms = of_call.cpu_ms + of_call.num_messages * message_ms
            print(
                f"{num_workers:8} {num_workers * CALLS_PER_WORKER:6} {name:12} {of_call.cpu_ms:8.3f} "
                f"{of_call.num_messages:9.2f} {whole_ms:9.3f} {1e3 / whole_ms:14,.0f}"
            )
    draw(costs, message_ms, options.picture)


if __name__ == "__main__":
    main()
