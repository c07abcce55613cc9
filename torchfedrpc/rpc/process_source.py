"""Workers that the driver starts on its own machine, and starts anew where they are lost."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Sequence

from torchfedrpc.rpc.member import Member
from torchfedrpc.rpc.processes import WorkerProcess
from torchfedrpc.rpc.source import Admit


class ProcessSource:
    """A number of worker processes: ``worker1`` and so on.

    Args:
        count: how many.

    Attributes:
        processes: those that run.
    """

    expects_workers = True
    is_sure = True

    def __init__(self, count: int) -> None:
        self.processes: dict[Member, WorkerProcess] = {}
        self._labels = [f"worker{number}" for number in range(1, count + 1)]
        self._ending: set[asyncio.Task[None]] = set()
        self._admit: Admit | None = None

    async def gather(self, *, is_only: bool) -> Sequence[Member]:
        """Start all of them."""
        return [self._start(label) for label in self._labels]

    def start(self, admit: Admit) -> None:
        """From now on replace whoever is lost."""
        self._admit = admit

    def lost(self, member: Member) -> bool:
        """Start another in its place."""
        if self._admit is None:
            return False
        self._admit(self._start(member.label))
        return True

    def abandon(self) -> None:
        """Kill the processes: those that are still importing would answer too late."""
        for member in list(self.processes):
            self._kill(member)

    async def close(self) -> None:
        """End the processes."""
        self._admit = None
        for member in list(self.processes):
            self._end(member)
        await asyncio.gather(*self._ending)

    def _start(self, label: str) -> Member:
        process = WorkerProcess()
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
