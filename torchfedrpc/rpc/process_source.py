"""Workers that the driver starts on its own machine, and starts anew where they are lost."""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Sequence

from torchfedrpc.rpc.member import Member
from torchfedrpc.rpc.processes import Surroundings, WorkerProcess
from torchfedrpc.rpc.retries import Retries
from torchfedrpc.rpc.source import Admit

logger = logging.getLogger(__name__)


class ProcessSource:
    """A number of worker processes: ``worker1`` and so on.

    Args:
        count: how many.
        surroundings: what each has, those that are started later as well.

    Attributes:
        processes: those that run.
    """

    expects_workers = True
    replaces = True

    def __init__(self, count: int, surroundings: Surroundings) -> None:
        self._surroundings = surroundings
        self.processes: dict[Member, WorkerProcess] = {}
        self._labels = [f"worker{number}" for number in range(1, count + 1)]
        self._retries = Retries()
        self._starting: set[asyncio.Task[None]] = set()
        self._ending: set[asyncio.Task[None]] = set()
        self._admit: Admit | None = None

    async def gather(self) -> Sequence[Member]:
        """Start all of them."""
        return [self._start(label) for label in self._labels]

    def start(self, admit: Admit) -> None:
        """From now on replace whoever is lost."""
        self._admit = admit

    def lost(self, member: Member) -> bool:
        """Start another in its place."""
        if self._admit is None:
            return False
        self._retries.lost(member)
        task = asyncio.ensure_future(self._start_again(member.label, self._admit))
        self._starting.add(task)
        task.add_done_callback(self._starting.discard)
        return True

    def abandon(self) -> None:
        """Kill the processes: those that are still importing would answer too late."""
        for member in list(self.processes):
            self._kill(member)

    async def close(self, reason: str) -> None:
        """End the processes."""
        self._admit = None
        for task in self._starting:
            task.cancel()
        await asyncio.gather(*self._starting, return_exceptions=True)
        for member in list(self.processes):
            self._end(member)
        await asyncio.gather(*self._ending)

    async def _start_again(self, label: str, admit: Admit) -> None:
        """Start one in the place of another; where the machine has no memory or no process left, once it has."""

        async def start() -> Member:
            return self._start(label)

        def tell(error: Exception) -> None:
            logger.warning("no process can be started for %s (%s): trying on", label, error)

        admit(await self._retries.until_done(label, start, OSError, tell))

    def _start(self, label: str) -> Member:
        process = WorkerProcess(self._surroundings)
        member = Member(
            label,
            process.link,
            process.pulse,
            socket.gethostname(),
            dismiss=lambda reason: self._kill(member),
            how_it_ended=process.how_it_ended,
            imports_main="path",
        )
        self.processes[member] = process
        return member

    def _kill(self, member: Member) -> None:
        if member in self.processes:
            self.processes[member].kill()
            self._end(member)

    def _end(self, member: Member) -> None:
        task = asyncio.ensure_future(self.processes.pop(member).stop())
        self._ending.add(task)
        task.add_done_callback(self._ending.discard)
