"""Cuts of the link between two nodes: under a launch, and between a driver and a worker that listens."""

from __future__ import annotations

import asyncio
import random
import signal
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from itertools import chain, repeat
from typing import Any

from chaos_driver import ALL_DIGESTS, ROUND_DIGESTS, Job
from chaos_leftovers import nothing_left
from chaos_nodes import ADDRESSES, Nodes
from chaos_process import Command, children_of, command_of, running
from chaos_report import HANG_S, Felt, HangError, Report
from chaos_rounds import SEED, pseudo
from chaos_run import NUM_CLIENTS, Digests, differing
from chaos_workers import FREE, LISTENING, Token, drained

LAUNCH = "sever the link of two nodes"
LISTENER = "cut the link of a listening worker"
NUM_ROUNDS = 4
_CUT_ROUND = 2  # the round before shows how long one takes
_NUM_RANKS = (2, 2)  # of each node; the driver is one of the first
_PORT = 29423
_HEARTBEAT_TIMEOUT_S = 5.0  # the least for workers on other machines
_START_S = 60.0
_END_S = 10.0  # in which those beyond the cut have to be gone, beside the heartbeat's timeout
_TORCHRUN_S = 35.0  # torchrun gives its ranks 30 s to end
_MOST_CUT_S = 2.0  # that the link stays down when the worker has noticed
_POLL_S = 0.05


class Run:
    """A run that is cut, with what its driver, on the first node, has told.

    Args:
        driver: its process.
        draw: draws the moment of the cut.

    Attributes:
        cut_at: when the link was cut (monotonic, in seconds).
    """

    def __init__(self, driver: Command, draw: random.Random) -> None:
        self.cut_at = 0.0
        self._driver = driver
        self._draw = draw
        self._told: list[dict[str, Any]] = []

    async def to_the_end(self, cut: Callable[[], Awaitable[None]]) -> None:
        """Read what it tells until the end, and cut at a random moment of a round.

        Raises:
            HangError: it tells nothing any more.
            RuntimeError: it ends by itself.
        """
        while not self._told or self._told[-1]["what"] != ALL_DIGESTS:
            told = await self._driver.told(HANG_S if self._told else _START_S)
            if told is None:
                raise RuntimeError("the driver has ended by itself")
            self._told.append(told)
            if told["what"] == "RoundStarted" and told["round_num"] == _CUT_ROUND:
                before, now = self.times("RoundStarted")[-2:]
                await asyncio.sleep(self._draw.uniform(0.0, now - before))
                self.cut_at = time.monotonic()
                await cut()

    def times(self, what: str, **values: Any) -> list[float]:
        """When it has told that."""
        return [one["at"] for one in self._told if one["what"] == what and values.items() <= one.items()]

    def felt(self, last: float, noticed_at: float) -> Felt:
        """How the cut was felt, where that was the time of the last strike."""
        (results_at,) = self.times(ROUND_DIGESTS, round_num=_CUT_ROUND)
        back_s = max(self.times("WorldFormed")) - last
        results_s = results_at - last if results_at > last else None
        return Felt((noticed_at - self.cut_at, back_s, results_s), len(self.times("WorkerLost")))

    def differing(self, expected: Sequence[Digests]) -> list[str]:
        """Which parts of its results have other bits than they should have."""
        pairs = zip(self._told[-1]["digests"], expected, strict=True)
        return sorted({name for pair in pairs for name in differing(*pair)})


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
        noticed_at = max(run.times("WorkerLost", worker=label)[0] for label in struck)
        report.fault(LAUNCH, struck, run.felt(run.cut_at, noticed_at), run.differing(expected))
        report.left_over(await _beyond(nodes, _HEARTBEAT_TIMEOUT_S + _END_S))


async def _cut_listener(nodes: Nodes, report: Report, expected: Sequence[Digests], draw: random.Random) -> None:
    """Cut a worker that listens off until it has noticed, and a little longer."""
    address = f"{ADDRESSES[1]}:{_PORT}"
    with Token() as token, running(*nodes.on(1, *token.command("listen", address))) as worker:
        await worker.line(LISTENING, 1, _START_S)
        runtime = {
            **pseudo(1, _HEARTBEAT_TIMEOUT_S),
            "client_endpoints": {f"client_{number}": address for number in range(1, NUM_CLIENTS // 2 + 1)},
            "token_file": token.path,
            "rejoin_timeout_s": HANG_S,
        }
        job = Job(runtime, SEED, NUM_ROUNDS, struck_round=_CUT_ROUND, rejoins=True)
        with running(*nodes.on(0, sys.executable, *job.script())) as driver:
            run = Run(driver, draw)
            free_at = plugged_at = 0.0

            async def cut() -> None:
                nonlocal free_at, plugged_at
                node = draw.randrange(2)
                nodes.unplug(node)
                await worker.line(FREE, 1, _HEARTBEAT_TIMEOUT_S + _END_S)
                free_at = time.monotonic()
                await asyncio.sleep(draw.uniform(0.0, _MOST_CUT_S))
                plugged_at = time.monotonic()
                nodes.plug(node)

            await run.to_the_end(cut)
            if status := await driver.ended(HANG_S):
                raise RuntimeError(f"the driver has ended with status {status}")
        await drained(worker)
        noticed_at = max(free_at, *run.times("WorkerLost", worker=address))
        report.fault(LISTENER, [address], run.felt(plugged_at, noticed_at), run.differing(expected))


@asynccontextmanager
async def _ranks(nodes: Nodes, node: int, job: Job) -> AsyncIterator[Command]:
    """One node's torchrun."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", f"--nproc-per-node={_NUM_RANKS[node]}"]
    torchrun += [f"--node-rank={node}", f"--master-addr={ADDRESSES[0]}", f"--master-port={_PORT}", *job.script()]
    with running(*nodes.on(node, *torchrun)) as command:
        yield command
        # After the cut torchrun waits five minutes for the other node, for part of which it heeds no signal.
        command.signal(signal.SIGTERM)
        deadline = time.monotonic() + _TORCHRUN_S
        while children_of(command.pid):
            if time.monotonic() > deadline:
                raise HangError(f"ranks of process {command.pid} do not end", _TORCHRUN_S)
            await asyncio.sleep(_POLL_S)


async def _beyond(nodes: Nodes, timeout_s: float) -> list[str]:
    """The processes on the second node, but for torchrun's own, that are there after so many seconds."""
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
