"""A round that is disturbed: who is struck in it, how soon that is noticed, and until when it is felt."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from chaos_process import children_of, command_of, state_of
from chaos_report import Felt, Section
from chaos_run import ChaosTrainer

from torchfedrpc.events import Event, WorkerJoined, WorkerLost, WorldFormed
from torchfedrpc.host.faults import FaultKind
from torchfedrpc.testing import Faults

_POLL_S = 0.002


def section(title: str) -> Section:
    """What `Scene.over` gives, in columns."""
    return Section(
        title,
        ("noticed", "back", "results"),
        "lost",
        "noticed: until the struck worker is known to be lost or to have left, back: from the last strike (from the\n"
        "start of one that joins) until the workers can be called again, results: until the struck round has all of\n"
        "its results; in seconds. lost: workers",
    )


class Log:
    """The events of a run, with the time of each (monotonic, in seconds), and a way to wait for some."""

    def __init__(self) -> None:
        self.entries: list[tuple[float, Event]] = []
        self._changed = asyncio.Event()

    def __call__(self, event: Event) -> None:
        """Take the next event."""
        self.entries.append((time.monotonic(), event))
        self._changed.set()

    def times(self, kind: type[Event], since: float, worker: str | None = None) -> list[float]:
        """When events of a kind came, all or those of one worker."""
        return [
            at
            for at, event in self.entries
            if isinstance(event, kind) and at >= since and worker in (None, getattr(event, "worker", None))
        ]

    async def until(self, met: Callable[[], object]) -> None:
        """Wait until a condition on the events is met."""
        while not met():
            self._changed.clear()
            await self._changed.wait()


@dataclass(frozen=True)
class Strike:
    """What was done to a worker.

    Attributes:
        label: its name.
        at: when (monotonic, in seconds).
        leads_to: the event of that worker that has to come of it.
    """

    label: str
    at: float
    leads_to: type[Event] = WorkerLost


@dataclass
class Scene:
    """One round, to be disturbed.

    Attributes:
        trainer: whose round.
        round_num: which.
        log: takes the events of the run.
        draw: draws whom and when.
        round_s: what a round takes.
        heartbeat_timeout_s: after which a silent worker is lost.
        ready: whether the round may begin.
    """

    trainer: ChaosTrainer
    round_num: int
    log: Log
    draw: random.Random
    round_s: float
    heartbeat_timeout_s: float
    ready: asyncio.Event = field(default_factory=asyncio.Event)
    _began: float = field(default_factory=time.monotonic)
    _strikes: list[Strike] = field(default_factory=list)
    _targets: list[str] = field(default_factory=list)

    @property
    def labels(self) -> list[str]:
        """The names of all workers."""
        return self.trainer.learner_proxy._router.workers()

    @property
    def struck(self) -> list[str]:
        """Whom a fault has struck, in order."""
        return list(dict.fromkeys(self._targets))

    def worker_of(self, client_id: str) -> str:
        """The worker that has a client's learner."""
        return self.trainer.learner_proxy._router.get_executor(client_id).worker_of(client_id)

    async def moment(self, up_to_s: float | None = None) -> None:
        """Wait for a random moment, of this round unless told of what."""
        self.ready.set()
        await asyncio.sleep(self.draw.uniform(0.0, self.round_s if up_to_s is None else up_to_s))

    def pick(self, count: int = 1) -> list[str]:
        """Workers at random."""
        return self.draw.sample(self.labels, count)

    def note(self, label: str, leads_to: type[Event] = WorkerLost, at: float | None = None) -> float:
        """A worker is struck now, or was at a time; gives that time."""
        strike = Strike(label, time.monotonic() if at is None else at, leads_to)
        self._targets.append(label)
        self._strikes.append(strike)
        return strike.at

    async def strike(
        self, label: str, number: signal.Signals, *, at_sidecar: bool = False, is_fatal: bool = True
    ) -> None:
        """Send a signal to a worker of the driver's own, or to the process that beats for it, once it is there.

        One that starts is not stopped: it may take two minutes to start, for which no round is to wait.
        """
        has_started = number == signal.SIGSTOP
        while (pid := self._pid(label, at_sidecar=at_sidecar, has_started=has_started)) is None:
            await asyncio.sleep(_POLL_S)
        if is_fatal:
            self.note(label)
        else:
            self._targets.append(label)
        os.kill(pid, number)

    async def lost(self, label: str) -> None:
        """Wait until a struck worker is known to be lost."""
        at = max(strike.at for strike in self._strikes if strike.label == label)
        await self.log.until(lambda: self.log.times(WorkerLost, at, label))

    async def joining(self, label: str) -> None:
        """Wait until this worker, or its replacement, and all others join a world."""
        group = self.trainer.learner_proxy._router._main._group
        while group.hosts or group._place._store is None or label not in group.members:
            await asyncio.sleep(_POLL_S)

    async def struck_by_itself(self, label: str, kind: FaultKind) -> None:
        """Have a worker's own call strike it, whichever of its calls of this round."""
        streaming = self.trainer.streaming(self.round_num)
        cohort = [one for one in self.trainer.select_clients(self.round_num) if self.worker_of(one) == label]
        num_calls = len(cohort) + (self.worker_of(streaming) == label)
        faults = getattr(Faults(), kind)(label, at_call=self.draw.randint(1, num_calls))
        pid = self._pid(label)
        async with faults.injected(self.trainer.learner_proxy):
            self.ready.set()
            well_at = time.monotonic()  # the loss may be noticed before we look the next time
            while pid is not None and state_of(pid) not in "TZX":
                well_at = time.monotonic()
                await asyncio.sleep(_POLL_S)
            self.note(label, at=well_at)
            await self.lost(label)

    async def over(self, results_at: float) -> Felt:
        """Wait until all that the strikes lead to was noticed, and the world is whole.

        Args:
            results_at: when the round had all of its results.

        Raises:
            RuntimeError: a worker was lost that should have left or joined.
        """
        log = self.log
        for strike in self._strikes:
            await log.until(lambda strike=strike: self._outcomes(strike) or self._outcomes(strike, WorkerLost))
            if not self._outcomes(strike):
                raise RuntimeError(f"{strike.label} was lost, and no {strike.leads_to.__name__} came of it")
        await log.until(lambda: not (lost := log.times(WorkerLost, self._began)) or log.times(WorldFormed, max(lost)))
        num_lost = len(log.times(WorkerLost, self._began))
        if not self._strikes:
            return Felt((None, None, None), num_lost)
        last = max(strike.at for strike in self._strikes)
        noticed = [
            min(self._outcomes(strike)) - strike.at for strike in self._strikes if strike.leads_to is not WorkerJoined
        ]
        formed = log.times(WorldFormed, last)
        return Felt(
            (
                max(noticed, default=None),
                max(formed) - last if formed else None,
                results_at - last if results_at > last else None,
            ),
            num_lost,
        )

    def _outcomes(self, strike: Strike, kind: type[Event] | None = None) -> list[float]:
        return self.log.times(kind or strike.leads_to, strike.at, strike.label)

    def _pid(self, label: str, *, at_sidecar: bool = False, has_started: bool = False) -> int | None:
        # The library does not tell its processes' ids: nobody else needs them.
        executor = self.trainer.learner_proxy._router._main
        for member, process in executor._processes.items():
            if has_started and executor._group.members.get(label) is not member:
                continue
            if member.label == label and not at_sidecar:
                return process.pid
            if member.label == label:
                return next((pid for pid in children_of(process.pid) if "sidecar.py" in command_of(pid)), None)
        return None
