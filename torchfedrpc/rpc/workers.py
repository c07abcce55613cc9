"""Table of a run's workers, with the state of each; calls wait here for a lost worker."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import dataclass
from enum import Enum
from typing import Any

from torchfedrpc.errors import ConfigError, WorkerLostError
from torchfedrpc.rpc.member import Member
from torchfedrpc.rpc.sources import Source

_REPLACED_WITHIN_S = 120.0  # by a process that the run starts


class WorkerState(Enum):
    """State of a worker.

        STARTING -> SERVING -> LEAVING
                     |   ^        |
                     v   |        |
                     LOST <-------+
                     |   ^
                     v   |
                    GAVE_UP

    A worker in LOST or GAVE_UP serves again after another process took its name and a world was formed with it.
    """

    STARTING = "starting"
    """The worker was admitted and takes part in the next world."""

    SERVING = "serving"
    """The worker accepts calls, which wait while a world is formed again."""

    LEAVING = "leaving"
    """The worker has asked to leave; its learners move to other workers."""

    LOST = "lost"
    """The worker was lost or has left; the run waits for another process in its place."""

    GAVE_UP = "gave up"
    """No other process has taken its place in time, or none is expected."""


_HAVE_SERVED = (WorkerState.SERVING, WorkerState.LEAVING)


@dataclass(eq=False)
class Worker:
    """Worker of a run, identified by its name. Several processes may have the name one after another.

    Attributes:
        label: The name.
        source: The source of its processes.
        machine: The machine of its process; None if its clients are placed on other workers.
        state: Its state.
        member: Its process in the present world, or in the one that is formed.
        newcomer: Its process while that is prepared for the next world. A worker has one process at most.
        reason: Reason why it is lost or was given up; empty otherwise.
        deadline: Timer after which it is given up; None if no process is waited for.
    """

    label: str
    source: Source
    machine: str | None
    state: WorkerState = WorkerState.STARTING
    member: Member | None = None
    newcomer: Member | None = None
    reason: str = ""
    deadline: asyncio.TimerHandle | None = None

    @property
    def has_served(self) -> bool:
        """Whether its process has accepted calls."""
        return self.state in _HAVE_SERVED

    def stop_waiting(self) -> None:
        """Stop waiting for another process."""
        if self.deadline is not None:
            self.deadline.cancel()
            self.deadline = None


class Workers:
    """Table of a run's workers by name. Calls wait here for a lost worker.

    Attributes:
        present: Name -> process of each worker that accepts calls now.
        failure: Reason why no worker can be called for the rest of the run; None otherwise.
    """

    def __init__(self) -> None:
        self._table: dict[str, Worker] = {}
        self._former: set[str] = set()  # names in use now or before, which are not assigned again
        self.present: dict[str, Member] = {}
        self.failure: ConfigError | WorkerLostError | None = None
        self._changed = asyncio.Event()

    def __getitem__(self, label: str) -> Worker:
        return self._table[label]

    def get(self, label: str) -> Worker | None:
        """Return a worker; None if it was removed."""
        return self._table.get(label)

    def __iter__(self) -> Iterator[Worker]:
        return iter(list(self._table.values()))

    @property
    def members(self) -> dict[str, Member]:
        """Name -> process of the workers of the present world, or of the one that is formed."""
        return {worker.label: worker.member for worker in self._table.values() if worker.member is not None}

    @property
    def newcomers(self) -> dict[str, Member]:
        """Name -> process of the workers that are prepared for a world."""
        return {worker.label: worker.newcomer for worker in self._table.values() if worker.newcomer is not None}

    @property
    def machines(self) -> dict[str, str]:
        """Name -> machine of the workers that clients can be placed on now."""
        return {label: member.machine for label, member in self.present.items()}

    @property
    def known_machines(self) -> dict[str, str]:
        """Name -> machine of all workers except those whose clients are placed on other workers."""
        return {worker.label: worker.machine for worker in self if worker.machine is not None}

    def admit(self, source: Source, member: Member) -> Worker:
        """Add a process that is to be prepared, and name it if it has no name."""
        if not member.label:
            numbers = (f"worker{number}" for number in itertools.count(1))
            member.label = next(label for label in numbers if label not in self._former)
        self._former.add(member.label)
        worker = self._table.get(member.label)
        if worker is None:
            worker = self._table[member.label] = Worker(member.label, source, member.machine)
        worker.source, worker.machine, worker.newcomer = source, member.machine, member
        return worker

    def enlist(self, worker: Worker) -> None:
        """Record that the process of a worker is prepared, and takes part in the next world."""
        worker.member, worker.newcomer = worker.newcomer, None

    def serve(self) -> list[str]:
        """Record that a world was formed: its workers accept calls. Returns those whose processes are new."""
        new = []
        for label, member in self.members.items():
            worker = self._table[label]
            if not worker.has_served:
                worker.state, worker.reason = WorkerState.SERVING, ""
                new.append(label)
            if worker.state is WorkerState.SERVING and self.failure is None:
                self.present[label] = member
            worker.stop_waiting()
        self.changed()
        return new

    def leave(self, label: str) -> None:
        """Record that a worker has asked to leave."""
        self._table[label].state = WorkerState.LEAVING
        self.present.pop(label, None)
        self.changed()

    def lose(self, label: str, reason: str) -> None:
        """Record that the process of a worker is lost."""
        worker = self._table[label]
        worker.state, worker.member, worker.newcomer, worker.reason = WorkerState.LOST, None, None, reason
        self.present.pop(label, None)
        self.changed()

    def expect(self, label: str, timeout_s: float) -> None:
        """Wait for another process in the place of a lost one, and give the worker up after a timeout."""
        worker = self._table[label]
        if worker.deadline is None:
            if worker.source.replaces:
                timeout_s, how = _REPLACED_WITHIN_S, "see its output for why"
            else:
                how = "start one again, or raise runtime.rejoin_timeout_s"
            loop = asyncio.get_running_loop()
            worker.deadline = loop.call_later(timeout_s, self._miss, worker, timeout_s, how)

    def give_up(self, label: str, reason: str) -> None:
        """Fail the calls that wait for a worker."""
        worker = self._table[label]
        worker.stop_waiting()
        worker.state, worker.reason = WorkerState.GAVE_UP, reason
        self.changed()

    def remove(self, label: str) -> None:
        """Remove a worker without clients."""
        self._table.pop(label).stop_waiting()
        self.changed()

    def fail(self, error: ConfigError | WorkerLostError) -> None:
        """Fail all present and later calls."""
        self.failure = error
        self.present.clear()
        self.changed()

    def changed(self) -> None:
        """Wake waiting callers, so that they check the table again."""
        self._changed.set()
        self._changed = asyncio.Event()

    def next_change(self) -> Coroutine[Any, Any, object]:
        """Return a coroutine that waits until `changed` is called after this call."""
        return self._changed.wait()

    def why_given_up(self, label: str) -> str | None:
        """Return the reason why a worker cannot be called, now or soon; None if it can."""
        if self.failure is not None:
            return str(self.failure)
        worker = self._table.get(label)
        return worker.reason if worker is not None and worker.state is WorkerState.GAVE_UP else None

    async def wait_for(self, place: Callable[[], str]) -> Member:
        """Wait until a worker accepts calls, and return its process.

        Args:
            place: Returns the worker's name, which may change during the wait.

        Raises:
            WorkerLostError: If the worker has no process and none is expected.
        """
        while True:
            if (reason := self.why_given_up(place())) is not None:
                raise WorkerLostError(reason)
            if (member := self.present.get(place())) is not None:
                return member
            await self.next_change()

    def close(self) -> None:
        """Fail all calls, and stop waiting for processes."""
        self.fail(WorkerLostError("the proxy is closed"))
        for worker in self._table.values():
            worker.stop_waiting()

    def _miss(self, worker: Worker, timeout_s: float, how: str) -> None:
        worker.deadline = None
        self.give_up(
            worker.label,
            f"{worker.reason}, and none has come in its place within {timeout_s:g} s: {how}; later calls are "
            f"answered once it is there",
        )
