"""The faults of chaos: what is done to the workers of a round, when, and how long it takes until they are back."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path

from chaos_run import STREAM_ITEMS, STREAM_METHOD, ChaosTrainer

from torchfedrpc.host.faults import FaultKind
from torchfedrpc.observe.events import Event, ProgressReported, WorkerLost, WorldFormed
from torchfedrpc.testing import Faults

_POLL_S = 0.002
_START_S = 2.0  # about what a replacement takes to start; one is struck at some moment of it
_JOIN_S = 0.15  # about what joining a world takes


class Log:
    """The events of a run, with the time of each (monotonic, in seconds), and a way to wait for some."""

    def __init__(self) -> None:
        self.entries: list[tuple[float, Event]] = []
        self._changed = asyncio.Event()

    def __call__(self, event: Event) -> None:
        """Take the next event."""
        self.entries.append((time.monotonic(), event))
        self._changed.set()

    def losses(self, since: float, label: str | None = None) -> list[float]:
        """When workers, or one of that name, were noticed to be lost."""
        return [
            at
            for at, event in self.entries
            if isinstance(event, WorkerLost) and at >= since and label in (None, event.worker)
        ]

    def formations(self, since: float) -> list[float]:
        """When the workers could be called again."""
        return [at for at, event in self.entries if isinstance(event, WorldFormed) and at >= since]

    async def until(self, met: Callable[[], object]) -> None:
        """Wait until a condition on the events is met."""
        while not met():
            self._changed.clear()
            await self._changed.wait()


@dataclass(frozen=True)
class Timing:
    """How long a fault was felt, in seconds.

    Attributes:
        noticed_s: from a strike until that worker was known to be lost, the longest; None where none was to be lost.
        formed_s: from the last strike until the workers could be called again; None where they always could.
        results_s: from the last strike until all results of the round had come; None where they had before.
        num_lost: workers that were lost, the struck ones and any other.
    """

    noticed_s: float | None
    formed_s: float | None
    results_s: float | None
    num_lost: int


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
    _strikes: list[tuple[str, float]] = field(default_factory=list)
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

    async def strike(
        self, label: str, number: signal.Signals, *, at_sidecar: bool = False, is_fatal: bool = True
    ) -> None:
        """Send a signal to a worker, or to the process that beats for it, as soon as it is there."""
        while (pid := self._pid(label, at_sidecar=at_sidecar)) is None:
            await asyncio.sleep(_POLL_S)
        self._targets.append(label)
        if is_fatal:
            self._strikes.append((label, time.monotonic()))
        os.kill(pid, number)

    async def lost(self, label: str) -> None:
        """Wait until a struck worker is known to be lost."""
        at = max(at for struck, at in self._strikes if struck == label)
        await self.log.until(lambda: self.log.losses(at, label))

    async def joining(self) -> None:
        """Wait until the members of the next world join it."""
        group = self.trainer.learner_proxy._router._main._group
        while group.hosts or group._store is None:
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
            while pid is not None and _state(pid) not in "TZX":
                well_at = time.monotonic()
                await asyncio.sleep(_POLL_S)
            self._targets.append(label)
            self._strikes.append((label, well_at))
            await self.lost(label)

    async def over(self) -> Timing:
        """Wait until every struck worker was noticed and the world is whole; called once the results are there."""
        ended = time.monotonic()
        for label, _ in self._strikes:
            await self.lost(label)
        await self.log.until(lambda: not (lost := self.log.losses(self._began)) or self.log.formations(max(lost)))
        num_lost = len(self.log.losses(self._began))
        if not self._strikes:
            return Timing(None, None, None, num_lost)
        last = max(at for _, at in self._strikes)
        noticed_s = max(min(self.log.losses(at, label)) - at for label, at in self._strikes)
        formed_s = max(self.log.formations(self._began)) - last
        return Timing(noticed_s, formed_s, ended - last if ended > last else None, num_lost)

    def _pid(self, label: str, *, at_sidecar: bool = False) -> int | None:
        # The library does not tell its processes' ids: nobody else needs them.
        processes = self.trainer.learner_proxy._router._main._processes
        for member, process in processes.items():
            if member.label == label and not at_sidecar:
                return process.pid
            if member.label == label:
                return next((pid for pid in _children_of(process.pid) if "sidecar.py" in _command_of(pid)), None)
        return None


async def kill(scene: Scene) -> None:
    """A worker is killed."""
    await scene.moment()
    await scene.strike(*scene.pick(), signal.SIGKILL)


async def kill_in_reformation(scene: Scene) -> None:
    """A worker is killed, and another while the world re-forms."""
    first, second = scene.pick(2)
    await scene.moment()
    await scene.strike(first, signal.SIGKILL)
    await scene.lost(first)
    await scene.moment(_START_S)
    await scene.strike(second, signal.SIGKILL)


async def kill_two(scene: Scene) -> None:
    """Two workers are killed at once."""
    await scene.moment()
    for label in scene.pick(2):
        await scene.strike(label, signal.SIGKILL)


async def freeze(scene: Scene) -> None:
    """A worker is stopped."""
    await scene.moment()
    await scene.strike(*scene.pick(), signal.SIGSTOP)


async def sever(scene: Scene) -> None:
    """A worker goes on, and nothing is heard of it any more."""
    await scene.moment()
    await scene.strike(*scene.pick(), signal.SIGUSR1, at_sidecar=True)


async def kill_stream(scene: Scene) -> None:
    """The worker that holds the open stream is killed in the middle of it."""
    client_id, num_reports = scene.trainer.streaming(scene.round_num), scene.draw.randint(1, STREAM_ITEMS)
    began = len(scene.log.entries)
    scene.ready.set()
    await scene.log.until(
        lambda: (
            sum(
                isinstance(event, ProgressReported) and event.client_id == client_id and event.method == STREAM_METHOD
                for _, event in scene.log.entries[began:]
            )
            >= num_reports
        )
    )
    await scene.strike(scene.worker_of(client_id), signal.SIGKILL)


async def kill_replacement(scene: Scene) -> None:
    """A worker is killed, and then the one that starts in its place."""
    (label,) = scene.pick()
    await scene.moment()
    await scene.strike(label, signal.SIGKILL)
    await scene.lost(label)
    await scene.moment(_START_S)
    await scene.strike(label, signal.SIGKILL)


async def kill_at_call(scene: Scene) -> None:
    """A call kills its worker."""
    await scene.struck_by_itself(*scene.pick(), "kill")


async def freeze_at_call(scene: Scene) -> None:
    """A call stops its worker."""
    await scene.struck_by_itself(*scene.pick(), "freeze")


async def terminate(scene: Scene) -> None:
    """A worker gets SIGTERM."""
    await scene.moment()
    await scene.strike(*scene.pick(), signal.SIGTERM)


async def freeze_sidecar(scene: Scene) -> None:
    """The process that beats for a worker is stopped."""
    await scene.moment()
    await scene.strike(*scene.pick(), signal.SIGSTOP, at_sidecar=True)


async def kill_sidecar(scene: Scene) -> None:
    """The process that beats for a worker is killed."""
    await scene.moment()
    await scene.strike(*scene.pick(), signal.SIGKILL, at_sidecar=True)


async def freeze_in_reformation(scene: Scene) -> None:
    """A worker is killed, and another stopped while the world re-forms."""
    first, second = scene.pick(2)
    await scene.moment()
    await scene.strike(first, signal.SIGKILL)
    await scene.lost(first)
    await scene.moment(_START_S)
    await scene.strike(second, signal.SIGSTOP)


async def kill_in_joining(scene: Scene) -> None:
    """A worker is killed, and then another or its replacement, as all join the next world."""
    await _strike_in_joining(scene, signal.SIGKILL)


async def freeze_in_joining(scene: Scene) -> None:
    """A worker is killed, and then another or its replacement stopped, as all join the next world."""
    await _strike_in_joining(scene, signal.SIGSTOP)


async def _strike_in_joining(scene: Scene, number: signal.Signals) -> None:
    first, second = scene.pick(2)
    await scene.moment()
    await scene.strike(first, signal.SIGKILL)
    await scene.lost(first)
    await scene.joining()
    await scene.moment(_JOIN_S)
    await scene.strike(scene.draw.choice([first, second]), number)


async def kill_all(scene: Scene) -> None:
    """All workers are killed at once."""
    await scene.moment()
    for label in scene.labels:
        await scene.strike(label, signal.SIGKILL)


async def pause(scene: Scene) -> None:
    """A worker is stopped for less than the heartbeat's timeout: it need not be lost."""
    (label,) = scene.pick()
    await scene.moment()
    await scene.strike(label, signal.SIGSTOP, is_fatal=False)
    await asyncio.sleep(0.4 * scene.heartbeat_timeout_s)
    await scene.strike(label, signal.SIGCONT, is_fatal=False)


# The first are those of a quick run.
FAULTS: dict[str, Callable[[Scene], Awaitable[None]]] = {
    "kill": kill,
    "kill, and another while re-forming": kill_in_reformation,
    "kill two at once": kill_two,
    "freeze": freeze,
    "sever": sever,
    "kill at an open stream": kill_stream,
    "kill, and its replacement": kill_replacement,
    "kill by a learner's call": kill_at_call,
    "freeze by a learner's call": freeze_at_call,
    "SIGTERM": terminate,
    "freeze the sidecar": freeze_sidecar,
    "kill the sidecar": kill_sidecar,
    "kill, and freeze another re-forming": freeze_in_reformation,
    "kill, and one as all of them join": kill_in_joining,
    "kill, and freeze one as all join": freeze_in_joining,
    "kill all": kill_all,
    "pause, shorter than the timeout": pause,
}


def _children_of(pid: int) -> list[int]:
    """The children of a process."""
    try:
        tasks = list(Path(f"/proc/{pid}/task").iterdir())
        return [int(child) for task in tasks for child in (task / "children").read_text().split()]
    except OSError:
        return []


def _command_of(pid: int) -> str:
    """The command line of a process; empty where it has ended."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_text(errors="replace").replace("\0", " ")
    except OSError:
        return ""


def _state(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return "X"
