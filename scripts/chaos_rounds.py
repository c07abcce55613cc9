"""Runs whose driver is the process of chaos: undisturbed ones, and one with a fault in each of its rounds."""

from __future__ import annotations

import asyncio
import contextlib
import faulthandler
import itertools
import random
import signal
import statistics
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from typing import Any

from chaos_faults import Fault
from chaos_report import HANG_S, HangError, Report
from chaos_run import ChaosTrainer, Digests, Disturbed, differing, end_of, federate, open_proxy, undisturbed
from chaos_scene import Log, Scene

import torchfedrpc as tfr
from torchfedrpc.events import RoundEnded

SEED = 7


def pseudo(num_processes: int, heartbeat_timeout_s: float) -> dict[str, Any]:
    """A runtime to be disturbed; its journals are short, so that there are snapshots, and few learners in memory."""
    return {
        "execution_mode": "pseudo",
        "num_processes": num_processes,
        "heartbeat_timeout_s": heartbeat_timeout_s,
        "journal_max_calls": 5,
        "max_resident_learners": 2,
    }


async def expected_digests(num_rounds: int) -> dict[int, list[Digests]]:
    """What undisturbed runs give, in local mode.

    Returns:
        Number of rounds, up to that many -> what `federate` gives for a run of so many.
    """
    ends: list[Digests] = []

    @contextlib.asynccontextmanager
    async def note_end(trainer: ChaosTrainer, round_num: int) -> AsyncIterator[None]:
        yield
        ends.append(await end_of(trainer))

    digests = await _whole_run({"execution_mode": "local"}, num_rounds, note_end)
    return {count: [*digests[:count], ends[count - 1]] for count in range(1, num_rounds + 1)}


async def time_a_round(runtime: Mapping[str, Any], expected: Sequence[Digests]) -> float:
    """Run undisturbed, which also warms this process up: the seconds of a round.

    Raises:
        SystemExit: its bits are not those of local mode, so that there is nothing to compare with.
    """
    ended: list[float] = []

    def note(event: Any) -> None:
        if isinstance(event, RoundEnded):
            ended.append(time.monotonic())

    if await _whole_run(runtime, len(expected) - 1, undisturbed, note) != expected:
        raise SystemExit("an undisturbed run in pseudo mode has other bits than in local mode")
    return statistics.median(late - early for early, late in itertools.pairwise(ended))


async def _whole_run(
    runtime: Mapping[str, Any],
    num_rounds: int,
    disturbed: Disturbed,
    watch: Callable[[Any], object] = lambda event: 0,
) -> list[Digests]:
    async with asyncio.timeout(HANG_S), open_proxy(runtime, SEED) as proxy:
        proxy.subscribe(watch)
        return await federate(proxy, num_rounds, disturbed)


class Disturbance:
    """Strikes every round of a run with the next of some faults.

    Args:
        faults: what strikes, by name, in each round.
        report: takes a row for each.
        expected: the digests of each round, and of the end, as they should be.
        draw: draws whom and when.
        round_s: what a round takes.
        runtime: the run's.
        dumped: whatever else is to say where it stands when a round hangs.
    """

    def __init__(
        self,
        faults: Sequence[tuple[str, Fault]],
        report: Report,
        expected: Sequence[Digests],
        draw: random.Random,
        round_s: float,
        runtime: Mapping[str, Any],
        dumped: Callable[[], object] = lambda: None,
    ) -> None:
        self.num_done = 0
        self._log = Log()
        self._faults = faults
        self._report = report
        self._expected = expected
        self._draw = draw
        self._round_s = round_s
        self._runtime = runtime
        self._dumped = dumped
        self._limit = asyncio.timeout(HANG_S)  # for what is outside of rounds

    async def run(self, and_then: Callable[[], Awaitable[None]] | None = None) -> None:
        """Run, disturbed in each round.

        Args:
            and_then: what is done once the run is over.
        """
        num_problems = self._report.num_problems
        try:
            async with self._limit, open_proxy(self._runtime, SEED) as proxy:
                proxy.subscribe(self._log)
                digests = await federate(proxy, len(self._faults), self._around)
            if and_then is not None:
                await and_then()
            self._report.differing("the end", differing(digests[-1], self._expected[-1]))
        except Exception as error:
            if self._report.num_problems == num_problems:  # outside of a round
                self._report.failed("the run", _hang() if self._limit.expired() else error)

    @contextlib.asynccontextmanager
    async def _around(self, trainer: ChaosTrainer, round_num: int) -> AsyncIterator[None]:
        name, fault = self._faults[round_num]
        self.num_done = round_num + 1
        heartbeat_timeout_s = self._runtime["heartbeat_timeout_s"]
        scene = Scene(trainer, round_num, self._log, self._draw, self._round_s, heartbeat_timeout_s)
        self._limit.reschedule(None)
        striking = asyncio.ensure_future(fault(scene))
        striking.add_done_callback(lambda _: scene.ready.set())  # where it fails, the round need not wait for it
        # Where the event loop itself hangs, this is all that can be had.
        faulthandler.dump_traceback_later(2 * HANG_S, exit=True)
        loop = asyncio.get_running_loop()
        dumping = loop.call_later(HANG_S - 1.0, self._dump, trainer.learner_proxy)
        try:
            async with asyncio.timeout(HANG_S) as limit:
                await scene.ready.wait()
                yield
                results_at = time.monotonic()
                await striking
                felt = await scene.over(results_at)
        except Exception as error:
            self._report.failed_fault(name, scene.struck, _hang() if limit.expired() else error)
            raise
        finally:
            self._limit.reschedule(loop.time() + HANG_S)
            dumping.cancel()
            faulthandler.cancel_dump_traceback_later()
            striking.cancel()
            await asyncio.gather(striking, return_exceptions=True)
        self._report.fault(name, scene.struck, felt, differing(trainer.digests[-1], self._expected[round_num]))

    def _dump(self, proxy: tfr.LearnerProxy) -> None:
        print("\nA round hangs. The driver's tasks and threads, then those of its workers:", file=sys.stderr)
        for task in asyncio.all_tasks():
            task.print_stack(file=sys.stderr)
        faulthandler.dump_traceback(all_threads=True)
        executor: Any = proxy._router._main
        group = executor._group
        print("in the world:", list(group.hosts), "members:", list(group.members), group._mending, file=sys.stderr)
        for record in executor._ledger:
            for asked in record.asked.values():
                call, is_sent = asked.call, asked.asked_through is not None
                what = f"{call.kind} {call.call_id}, {record.client_id}.{call.method} on {record.label}"
                state = f"sent: {is_sent}, to rebuild: {asked.is_own}, items: {asked.num_items}"
                print(f"not answered: {what} ({state})", file=sys.stderr)
        for process in executor._processes.values():
            process._process.send_signal(signal.SIGUSR2)
            time.sleep(0.5)  # they write to the same stream
        self._dumped()


def _hang() -> HangError:
    return HangError("nothing comes of it")
