"""A disturbed run: its rounds, the strikes in them, the events that follow, and whether these were expected."""

from __future__ import annotations

import asyncio
import contextlib
import faulthandler
import itertools
import os
import random
import signal
import statistics
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal

import internals
from processes import handles, is_alive, state_of

import torchfedrpc as tfr
from chaos.leaks import marked_processes
from chaos.report import HANG_S, HangError, Observed, Report
from chaos.workload import (
    ChaosTrainer,
    Digests,
    Disturbed,
    Traps,
    differing,
    end_of,
    federate,
    open_proxy,
    undisturbed,
)
from torchfedrpc.events import Event, RoundEnded, WorkerJoined, WorkerLeft, WorkerLost, WorldFormed
from torchfedrpc.testing import Faults

SEED = 7
_POLL_S = 0.002
_NOTICED_S = 1.0  # the end of a process
_LEFT_S = 30.0  # a worker that leaves waits for its calls, and its learners move
BACK_S = 90.0  # a replacement imports torch, which takes it some seconds, a multiple of it on a busy machine


# What a fault has to lead to.


@dataclass(frozen=True)
class Expected:
    """The effects that a fault has to have.

    Attributes:
        num_lost: The number of losses: each struck worker is lost once for each strike, and no other worker is.
        is_silent: Whether a worker only stops to send heartbeats, so that only the timeout shows its loss.
        back_s: Seconds from the last strike until all workers can be called again, at most.
    """

    num_lost: int = 1
    is_silent: bool = False
    back_s: float = BACK_S

    def noticed_s(self, heartbeat_timeout_s: float) -> float:
        """Seconds until a loss is noticed, at most."""
        return heartbeat_timeout_s + 1.0 if self.is_silent else _NOTICED_S


# What happens.


class Log:
    """The events of a run, with the time of each (monotonic, in seconds)."""

    def __init__(self) -> None:
        self.entries: list[tuple[float, Event]] = []
        self._changed = asyncio.Event()

    def __call__(self, event: Event) -> None:
        """Add an event."""
        self.entries.append((time.monotonic(), event))
        self._changed.set()

    def times(self, kind: type[Event], since: float, worker: str | None = None) -> list[float]:
        """When events of a kind came, of all workers or of one."""
        return [
            at
            for at, event in self.entries
            if isinstance(event, kind) and at >= since and worker in (None, getattr(event, "worker", None))
        ]

    def lost(self, since: float) -> list[WorkerLost]:
        """The losses since a time, in order."""
        return [event for at, event in self.entries if isinstance(event, WorkerLost) and at >= since]

    async def until(self, met: Callable[[], object]) -> None:
        """Wait until a condition on the events is met."""
        while not met():
            self._changed.clear()
            await self._changed.wait()


@dataclass(frozen=True)
class Strike:
    """Something that was done to a worker.

    Attributes:
        worker: Its name.
        at: The time (monotonic, in seconds).
        leads_to: The event of the worker that has to follow.
        under_way: What the run was doing.
    """

    worker: str
    at: float
    leads_to: type[Event]
    under_way: str


@dataclass
class Scene:
    """A round that is disturbed.

    Attributes:
        trainer: The trainer whose round it is.
        round_num: The number of the round.
        log: The events of the run.
        draw: Draws workers and moments.
        round_s: The seconds that an undisturbed round takes.
        traps: Kills workers at points of their learners' code.
        ready: Set when the round may begin.
        results: Set when the round has all of its results.
        struck: The workers that were struck, in order.
    """

    trainer: ChaosTrainer
    round_num: int
    log: Log
    draw: random.Random
    round_s: float
    heartbeat_timeout_s: float
    traps: Traps
    ready: asyncio.Event = field(default_factory=asyncio.Event)
    results: asyncio.Event = field(default_factory=asyncio.Event)
    struck: list[str] = field(default_factory=list)
    _began: float = field(default_factory=time.monotonic)
    _strikes: list[Strike] = field(default_factory=list)
    _members: set[str] = field(init=False)

    def __post_init__(self) -> None:
        self._members = set(self.workers)

    @property
    def proxy(self) -> tfr.LearnerProxy:
        """The proxy of the run."""
        return self.trainer.learner_proxy

    @property
    def workers(self) -> list[str]:
        """The names of the workers that are there."""
        return list(self.proxy.stats()["workers"])

    async def pick(self, count: int = 1) -> list[str]:
        """Different workers at random, once as many are there: those lost before may still be replaced."""
        while len(self.workers) < count:
            await asyncio.sleep(_POLL_S)
        return self.draw.sample(self.workers, count)

    async def moment(self, up_to_s: float | None = None) -> None:
        """Wait for a random moment, of this round or of as many seconds."""
        self.ready.set()
        await asyncio.sleep(self.draw.uniform(0.0, self.round_s if up_to_s is None else up_to_s))

    async def during(self, activity: str) -> None:
        """Wait for a random moment of an activity, or its next time if it ends before, or for the round's results."""
        self.ready.set()
        activities = self.trainer.activities
        await self._until_or_results(activities.until(activity))
        if activities.seconds[activity]:
            await asyncio.sleep(self.draw.uniform(0.0, min(activities.seconds[activity])))
        await self._until_or_results(activities.until(activity))

    async def _until_or_results(self, coroutine: Coroutine[Any, Any, None]) -> None:
        waiting = [asyncio.ensure_future(coroutine), asyncio.ensure_future(self.results.wait())]
        try:
            await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in waiting:
                task.cancel()

    def under_way(self, besides: str = "") -> str:
        """What the run is doing now."""
        forming = internals.forming(self.proxy)
        names = [besides, *self.trainer.activities.names, forming and f"forming: {forming}"]
        return "+".join(filter(None, names))

    def note(
        self, worker: str, leads_to: type[Event] = WorkerLost, at: float | None = None, under_way: str | None = None
    ) -> float:
        """Note a strike; returns its time.

        Args:
            worker: The worker that is struck.
            leads_to: The event that has to follow.
            at: The time; now, unless given.
            under_way: What the run was doing then; what it is doing now, unless given.
        """
        at, doing = at or time.monotonic(), self.under_way() if under_way is None else under_way
        if worker not in self.struck:
            self.struck.append(worker)
        self._strikes.append(Strike(worker, at, leads_to, doing))
        return at

    async def kill(self, worker: str) -> None:
        """Kill a worker, once its process has been started."""
        pid = await self._until_there(lambda: internals.started_pid_of(self.proxy, worker))
        self.note(worker)
        os.kill(pid, signal.SIGKILL)

    async def signal(self, worker: str, number: signal.Signals, *, is_fatal: bool = True) -> None:
        """Send a signal to a worker that is ready: nothing but a heartbeat shows that a process is stopped."""
        pid = await self._until_there(lambda: internals.pid_of(self.proxy, worker))
        if is_fatal:
            self.note(worker)
        elif worker not in self.struck:
            self.struck.append(worker)
        os.kill(pid, number)

    async def strike_heartbeat(self, worker: str, strike: Callable[[int], object]) -> None:
        """Do something to the process that sends a worker's heartbeats."""
        pid = await self._until_there(lambda: internals.pid_of(self.proxy, worker))
        heartbeat_process = await self._until_there(lambda: internals.heartbeat_pid(pid))
        self.note(worker)
        strike(heartbeat_process)

    async def lost(self, worker: str) -> None:
        """Wait until the loss of a struck worker is known."""
        at = max(strike.at for strike in self._strikes if strike.worker == worker)
        await self.log.until(lambda: self.log.times(WorkerLost, at, worker))

    async def world_is_formed_with(self, worker: str, step: str) -> None:
        """Wait until a world is formed, a step of that is under way, and a worker or its replacement takes part."""
        proxy = self.proxy
        while internals.forming(proxy) != step or not internals.is_in_next_world(proxy, worker):
            await asyncio.sleep(_POLL_S)

    async def trapped(self, point: str, pid: int, during: str) -> tuple[float, str]:
        """Have a process killed when its learners' code reaches a point; returns the time, and what was under way.

        If the code does not reach it before the round has all of its results, the process is killed then.

        Args:
            point: ``capture`` or ``restore``.
            pid: The process.
            during: The activity of which that is a part.

        Raises:
            RuntimeError: If the process ends by itself.
        """
        self.traps.arm(point, pid)
        self.ready.set()
        while (at := self.traps.sprung_at(point, pid)) is None:
            if not is_alive(pid) and self.traps.sprung_at(point, pid) is None:
                raise RuntimeError(f"process {pid} has ended, and none of its learners has reached {point!r}")
            if self.results.is_set():
                self.traps.disarm(point, pid)
                os.kill(pid, signal.SIGKILL)
                return time.monotonic(), self.under_way()
            await asyncio.sleep(_POLL_S)
        return at, self.under_way(during)

    async def spring(self, point: str, pid: int) -> None:
        """Kill a process that has a trap at a point and has not reached it, and wait until its loss is known."""
        if self.traps.spring(point, pid):
            await self.event_of(WorkerLost, time.monotonic())

    async def event_of(self, kind: type[Event], since: float, among: Iterable[str] | None = None) -> str:
        """Wait for an event of a worker, one of these or any; returns its name."""

        def found() -> list[str]:
            events = [event for at, event in self.log.entries if isinstance(event, kind) and at >= since]
            workers = [str(getattr(event, "worker", "")) for event in events]
            return [worker for worker in workers if among is None or worker in among]

        await self.log.until(found)
        return found()[0]

    async def struck_by_call(self, worker: str, kind: Literal["kill", "freeze"]) -> None:
        """Have a worker strike itself in one of its calls of this round."""
        streaming = self.trainer.streaming(self.round_num)
        cohort = self.trainer.select_clients(self.round_num)
        num_calls = sum(internals.worker_of(self.proxy, one) == worker for one in (*cohort, streaming))
        at_call = self.draw.randint(1, max(num_calls, 1))  # stateless learners may all have been elsewhere
        faults: Faults = getattr(Faults(), kind)(worker, at_call=at_call)
        pid = internals.pid_of(self.proxy, worker)
        async with faults.injected(self.proxy):
            self.ready.set()
            at = time.monotonic()  # of the last look: the loss may be noticed before the next
            while pid is not None and state_of(pid) not in "TZX":
                at = time.monotonic()
                await asyncio.sleep(_POLL_S)
            self.note(worker, at=at)
            await self.lost(worker)

    async def over(self, results_at: float, expected: Expected) -> Observed:
        """Wait until the effects of all strikes were noticed and the world is whole.

        Args:
            results_at: When the round had all of its results.
            expected: The effects that the fault has to have.

        Raises:
            RuntimeError: If a worker was lost that should have left or joined.
        """
        log = self.log
        for strike in self._strikes:
            await log.until(partial(self._has_ended, strike))
            if not self._effects(strike):
                raise RuntimeError(f"{strike.worker} was lost, and {strike.leads_to.__name__} did not follow")
        await self._world_is_whole()
        lost = log.lost(self._began)
        last = max((strike.at for strike in self._strikes), default=results_at)
        formed = log.times(WorldFormed, last) if self._strikes else []
        noticed_s = {kind: self._noticed_s(kind) for kind in (WorkerLost, WorkerLeft)}
        back_s = max(formed) - last if formed else None
        return Observed(
            max((one for one in noticed_s.values() if one is not None), default=None),
            back_s,
            results_at - last if results_at > last else None,
            len(lost),
            list(dict.fromkeys(strike.under_way or "-" for strike in self._strikes)),
            missed=[
                *_too_late("noticed", noticed_s[WorkerLost], expected.noticed_s(self.heartbeat_timeout_s)),
                *_too_late("left", noticed_s[WorkerLeft], _LEFT_S),
                *_too_late("back", back_s, expected.back_s),
                *self._wrong_losses(lost, expected.num_lost),
            ],
        )

    async def _world_is_whole(self) -> None:
        """Wait for the next world, if a lost worker was in a world; the others go on without a lost newcomer."""
        joined = {event.worker for _, event in self.log.entries if isinstance(event, WorkerJoined)}
        members, log = self._members | joined, self.log

        def losses() -> list[float]:
            return [at for worker in members for at in log.times(WorkerLost, self._began, worker)]

        await log.until(lambda: not losses() or log.times(WorldFormed, max(losses())))
        while internals.forming(self.proxy):
            await asyncio.sleep(_POLL_S)

    def _wrong_losses(self, lost: list[WorkerLost], num_lost: int) -> list[str]:
        struck = [strike.worker for strike in self._strikes if strike.leads_to is WorkerLost]
        if len(lost) == num_lost and Counter(event.worker for event in lost) == Counter(struck):
            return []
        were = ",".join(f"{event.worker} ({event.reason})" for event in lost)
        return [f"{num_lost} lost, of {','.join(struck) or 'none'}; were {were or 'none'}"]

    def _noticed_s(self, kind: type[Event]) -> float | None:
        seconds = [min(self._effects(one)) - one.at for one in self._strikes if one.leads_to is kind]
        return max(seconds, default=None)

    def _has_ended(self, strike: Strike) -> bool:
        return bool(self._effects(strike) or self._effects(strike, WorkerLost))

    def _effects(self, strike: Strike, kind: type[Event] | None = None) -> list[float]:
        return self.log.times(kind or strike.leads_to, strike.at, strike.worker)

    async def _until_there(self, find: Callable[[], int | None]) -> int:
        while (pid := find()) is None:
            await asyncio.sleep(_POLL_S)
        return pid


def _too_late(what: str, seconds: float | None, limit_s: float) -> list[str]:
    return [f"{what} within {limit_s:g} s"] if seconds is not None and seconds > limit_s else []


# Runs.

Fault = Callable[[Scene], Awaitable[None]]


def pseudo(num_processes: int, heartbeat_timeout_s: float) -> dict[str, Any]:
    """A runtime whose journals are short, so that snapshots are taken, and that keeps few learners in memory."""
    return {
        "execution_mode": "pseudo",
        "num_processes": num_processes,
        "heartbeat_timeout_s": heartbeat_timeout_s,
        "journal_max_calls": 5,
        "max_resident_learners": 2,
    }


async def expected_digests(num_rounds: int) -> dict[int, list[Digests]]:
    """The digests of undisturbed runs in local mode: number of rounds -> what `federate` returns."""
    ends: list[Digests] = []

    @contextlib.asynccontextmanager
    async def note_end(trainer: ChaosTrainer, round_num: int) -> AsyncIterator[None]:
        yield
        ends.append(await end_of(trainer))

    digests = await _whole_run({"execution_mode": "local"}, num_rounds, note_end)
    return {count: [*digests[:count], ends[count - 1]] for count in range(1, num_rounds + 1)}


async def time_a_round(runtime: Mapping[str, Any], expected: Sequence[Digests]) -> float:
    """Run undisturbed, which also warms this process up; returns the seconds of a round.

    Raises:
        SystemExit: If its bits are not those of local mode.
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
    """Strikes each round of a run with another fault.

    Args:
        faults: For each round the name of its fault, the fault, and the effects that it has to have.
        report: Takes a row for each fault.
        expected: The digests of each round, and of the end.
        draw: Draws workers and moments.
        round_s: The seconds that an undisturbed round takes.
        runtime: The runtime configuration.
        traps: Kills workers at points of their learners' code.

    Attributes:
        num_done: How many faults have struck.
    """

    def __init__(
        self,
        faults: Sequence[tuple[str, Fault, Expected]],
        report: Report,
        expected: Sequence[Digests],
        draw: random.Random,
        round_s: float,
        runtime: Mapping[str, Any],
        traps: Traps,
    ) -> None:
        self.num_done = 0
        self._log = Log()
        self._faults = faults
        self._report = report
        self._expected = expected
        self._draw = draw
        self._round_s = round_s
        self._runtime = runtime
        self._traps = traps
        self._limit = asyncio.timeout(HANG_S)  # outside of rounds

    async def run(self, finish: Callable[[], Awaitable[None]] | None = None) -> None:
        """Run.

        Args:
            finish: Awaited after the end of the run.
        """
        num_problems = self._report.num_problems
        try:
            async with self._limit, open_proxy(self._runtime, SEED) as proxy:
                proxy.subscribe(self._log)
                digests = await federate(proxy, len(self._faults), self._around)
            if finish is not None:
                await finish()
            self._report.differing("the end", differing(digests[-1], self._expected[-1]))
        except Exception as error:
            if self._report.num_problems == num_problems:  # outside of a round
                self._report.failed("the run", _hang() if self._limit.expired() else error)

    @contextlib.asynccontextmanager
    async def _around(self, trainer: ChaosTrainer, round_num: int) -> AsyncIterator[None]:
        name, fault, expected = self._faults[round_num]
        self.num_done = round_num + 1
        timeout_s = self._runtime["heartbeat_timeout_s"]
        scene = Scene(trainer, round_num, self._log, self._draw, self._round_s, timeout_s, self._traps)
        self._limit.reschedule(None)
        striking = asyncio.ensure_future(fault(scene))
        striking.add_done_callback(lambda _: scene.ready.set())  # if it fails, the round need not wait for it
        faulthandler.dump_traceback_later(2 * HANG_S, exit=True)  # if the event loop itself hangs
        loop = asyncio.get_running_loop()
        dumping = loop.call_later(HANG_S - 1.0, _dump)
        try:
            async with asyncio.timeout(HANG_S) as limit:
                await scene.ready.wait()
                yield
                results_at = time.monotonic()
                scene.results.set()
                await striking
                observed = await scene.over(results_at, expected)
        except Exception as error:
            self._report.failed_fault(name, scene.struck, _hang() if limit.expired() else error)
            raise
        finally:
            self._limit.reschedule(loop.time() + HANG_S)
            dumping.cancel()
            faulthandler.cancel_dump_traceback_later()
            striking.cancel()
            await asyncio.gather(striking, return_exceptions=True)
        different = differing(trainer.digests[-1], self._expected[round_num])
        self._report.fault(name, scene.struck, replace(observed, different=different))


def _dump() -> None:
    """Print the stacks of this process and, by their own handlers, of its workers."""
    print("\nA round hangs. The driver's tasks and threads, then those of its workers:", file=sys.stderr)
    for task in asyncio.all_tasks():
        task.print_stack(file=sys.stderr)
    faulthandler.dump_traceback(all_threads=True)
    for pid in marked_processes():
        if pid != os.getpid() and handles(pid, signal.SIGUSR2):
            os.kill(pid, signal.SIGUSR2)
            time.sleep(0.5)  # they write to the same stream


def _hang() -> HangError:
    return HangError("it does not end")
