"""Cuts of the link between two nodes: under a launch, and between a driver and a worker that listens."""

from __future__ import annotations

import asyncio
import random
import signal
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager, closing
from itertools import chain, repeat
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from namespaces import ADDRESSES, Nodes
from processes import children_of, command_of
from workers import WorkerCommand, make_token

from chaos.drivers import ALL_DIGESTS, ROUND_DIGESTS, Driver, Job, driving
from chaos.elastic import FREE, LISTENING, drained, ends_well, line
from chaos.leaks import nothing_left
from chaos.report import HANG_S, HangError, Observed, Report
from chaos.stage import BACK_S, SEED, pseudo
from chaos.workload import NUM_CLIENTS, Digests, differing

LAUNCH = "sever the link of two nodes"
LISTENER = "cut the link of a listening worker"
NUM_ROUNDS = 4
_CUT_ROUND = 2  # the round before shows how long one takes
_NUM_RANKS = (2, 2)  # of each node; the driver is one of the first
_PORT = 29423
_HEARTBEAT_TIMEOUT_S = 5.0  # the least for workers on other machines
_START_S = 60.0
_END_S = 10.0  # beside the heartbeat's timeout, until the processes beyond the cut have ended
_TORCHRUN_S = 35.0  # torchrun gives its ranks 30 s to end
_MOST_CUT_S = 2.0  # that the link stays down when the worker has noticed
_POLL_S = 0.05


class Run:
    """A run whose link is cut.

    Args:
        driver: Its driver, on the first node.
        draw: Draws the moment of the cut.

    Attributes:
        cut_at: When the link was cut (monotonic, in seconds).
    """

    def __init__(self, driver: Driver, draw: random.Random) -> None:
        self.cut_at = 0.0
        self._driver = driver
        self._draw = draw
        self._messages: list[dict[str, Any]] = []

    async def to_the_end(self, cut: Callable[[], Awaitable[None]]) -> None:
        """Read the driver's messages until the end, and cut at a random moment of a round.

        Raises:
            HangError: If there are no more messages.
            RuntimeError: If it ends by itself.
        """
        while not self._messages or self._messages[-1]["what"] != ALL_DIGESTS:
            message = await self._driver.message(HANG_S if self._messages else _START_S)
            if message is None:
                raise RuntimeError("the driver has ended by itself")
            self._messages.append(message)
            if message["what"] == "RoundStarted" and message["round_num"] == _CUT_ROUND:
                before, now = self.times("RoundStarted")[-2:]
                await asyncio.sleep(self._draw.uniform(0.0, now - before))
                self.cut_at = time.monotonic()
                await cut()

    def times(self, what: str, **values: Any) -> list[float]:
        """When it has printed such messages."""
        return [one["at"] for one in self._messages if one["what"] == what and values.items() <= one.items()]

    def observed(self, last: float, noticed_at: float, num_lost: int, expected: Sequence[Digests]) -> Observed:
        """The effects of the cut.

        Args:
            last: When the last strike was.
            noticed_at: When the last worker was known to be lost.
            num_lost: How many workers have to be lost.
            expected: The digests of each round, and of the end.
        """
        (results_at,) = self.times(ROUND_DIGESTS, round_num=_CUT_ROUND)
        back_s, noticed_s = max(self.times("WorldFormed")) - last, noticed_at - self.cut_at
        lost = len(self.times("WorkerLost"))
        missed = [f"noticed within {_HEARTBEAT_TIMEOUT_S + 1:g} s"] if noticed_s > _HEARTBEAT_TIMEOUT_S + 1 else []
        missed += [f"back within {BACK_S:g} s"] if back_s > BACK_S else []
        missed += [f"{num_lost} lost"] if lost != num_lost else []
        pairs = zip(self._messages[-1]["digests"], expected, strict=True)
        different = sorted({name for pair in pairs for name in differing(*pair)})
        results_s = results_at - last if results_at > last else None
        return Observed(noticed_s, back_s, results_s, lost, ["round"], different, missed)


async def _cut_launch(nodes: Nodes, report: Report, expected: Sequence[Digests], draw: random.Random) -> None:
    """Sever a launch on two nodes for good."""
    runtime = {
        "execution_mode": "distributed",
        "heartbeat_timeout_s": _HEARTBEAT_TIMEOUT_S,
        "journal_max_calls": 5,
    }
    job = Job(runtime, SEED, NUM_ROUNDS, struck_round=_CUT_ROUND)
    async with _ranks(nodes, 0, job) as driver, _ranks(nodes, 1, job):
        run = Run(driver, draw)

        async def cut() -> None:
            nodes.unplug(1)

        await run.to_the_end(cut)
        struck = [f"worker{rank}" for rank in range(_NUM_RANKS[0], sum(_NUM_RANKS))]
        noticed_at = max(run.times("WorkerLost", worker=worker)[0] for worker in struck)
        report.fault(LAUNCH, struck, run.observed(run.cut_at, noticed_at, len(struck), expected))
        report.left_over(await _beyond(nodes, _HEARTBEAT_TIMEOUT_S + _END_S))


async def _cut_listener(nodes: Nodes, report: Report, expected: Sequence[Digests], draw: random.Random) -> None:
    """Cut a worker that listens off until it has noticed, and a little longer."""
    address = f"{ADDRESSES[1]}:{_PORT}"
    with TemporaryDirectory() as folder:
        token = make_token(Path(folder))
        listen = WorkerCommand("--listen", address, "--token-file", token, prefix=nodes.on(1))
        with closing(listen) as worker:
            await line(worker, LISTENING, timeout_s=_START_S)
            runtime = {
                **pseudo(1, _HEARTBEAT_TIMEOUT_S),
                "client_endpoints": {f"client_{number}": address for number in range(1, NUM_CLIENTS // 2 + 1)},
                "token_file": token,
                "rejoin_timeout_s": HANG_S,
            }
            job = Job(runtime, SEED, NUM_ROUNDS, struck_round=_CUT_ROUND, rejoins=True)
            with driving(*nodes.on(0, sys.executable, *job.arguments())) as driver:
                run = Run(driver, draw)
                free_at = plugged_at = 0.0

                async def cut() -> None:
                    nonlocal free_at, plugged_at
                    node = draw.randrange(2)
                    nodes.unplug(node)
                    await line(worker, FREE, timeout_s=_HEARTBEAT_TIMEOUT_S + _END_S)
                    free_at = time.monotonic()
                    await asyncio.sleep(draw.uniform(0.0, _MOST_CUT_S))
                    plugged_at = time.monotonic()
                    nodes.plug(node)

                await run.to_the_end(cut)
                await ends_well(driver.process)
            await drained(worker)
            noticed_at = max(free_at, *run.times("WorkerLost", worker=address))
            report.fault(LISTENER, [address], run.observed(plugged_at, noticed_at, 1, expected))


@asynccontextmanager
async def _ranks(nodes: Nodes, node: int, job: Job) -> AsyncIterator[Driver]:
    """The torchrun of a node."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", f"--nproc-per-node={_NUM_RANKS[node]}"]
    torchrun += [f"--node-rank={node}", f"--master-addr={ADDRESSES[0]}", f"--master-port={_PORT}", *job.arguments()]
    with driving(*nodes.on(node, *torchrun)) as driver:
        yield driver
        # After the cut torchrun waits five minutes for the other node, for part of which it heeds no signal.
        driver.process.signal(signal.SIGTERM)
        deadline = time.monotonic() + _TORCHRUN_S
        while children_of(driver.process.pid):
            if time.monotonic() > deadline:
                raise HangError(f"ranks of process {driver.process.pid} do not end", _TORCHRUN_S)
            await asyncio.sleep(_POLL_S)


async def _beyond(nodes: Nodes, timeout_s: float) -> list[str]:
    """The processes on the second node, except torchrun, that have not ended after so many seconds."""
    deadline = time.monotonic() + timeout_s
    while True:
        commands = {pid: command_of(pid) for pid in nodes.inside(1)}
        found = [
            f"beyond the cut, process {pid} ({command[:100]})"
            for pid, command in commands.items()
            if command and "torch.distributed.run" not in command
        ]
        if not found or time.monotonic() > deadline:
            return found
        await asyncio.sleep(_POLL_S)


async def cut_links(
    num_launches: int, num_listeners: int, report: Report, expected: Sequence[Digests], draw: random.Random
) -> None:
    """Cut the links of so many launches, and of so many workers that listen."""
    cuts = chain(repeat((LAUNCH, _cut_launch), num_launches), repeat((LISTENER, _cut_listener), num_listeners))
    for name, cut in cuts:
        async with nothing_left(report):
            try:
                with Nodes() as nodes:
                    await cut(nodes, report, expected, draw)
            except Exception as error:
                report.failed_fault(name, [], error)
