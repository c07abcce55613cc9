"""Pseudo mode: workers are processes on this machine that the driver starts itself."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Sequence

from torchfedrpc.config import RuntimeConfig
from torchfedrpc.executors.base import ExecutorSpec
from torchfedrpc.executors.placement import LOCAL
from torchfedrpc.executors.remote import RemoteExecutor
from torchfedrpc.registry import executor
from torchfedrpc.rpc.backend import torch_rpc
from torchfedrpc.rpc.member import Member
from torchfedrpc.rpc.processes import WorkerProcess
from torchfedrpc.rpc.worker_group import WorkerGroup


@executor("pseudo")
class PseudoExecutor(RemoteExecutor):
    """Starts ``num_processes`` workers on loopback, others for those that are lost, and ends all with the run."""

    def __init__(self, config: RuntimeConfig | None = None) -> None:
        super().__init__(config)
        self._processes: dict[Member, WorkerProcess] = {}
        self._ending: set[asyncio.Task[None]] = set()
        self._is_open = False

    async def open(self, spec: ExecutorSpec) -> None:
        """Start the workers and form a world with them."""
        await super().open(spec)
        self._is_open = True

    async def close(self) -> None:
        """End the world and the processes."""
        if not self._is_open:  # opening was cut short: workers that are still importing would answer too late
            for member in list(self._processes):
                self._kill(member)
        self._is_open = False
        try:
            await super().close()
        finally:
            for member in list(self._processes):
                self._end(member)
            await asyncio.gather(*self._ending)

    async def _gather(self, spec: ExecutorSpec) -> Sequence[Member]:
        torch_rpc()  # refuse before any process is started
        num_clients = sum(self.config.client_endpoints.get(client_id) != LOCAL for client_id in spec.clients)
        count = self.config.num_processes or min(os.cpu_count() or 1, num_clients)
        return [self._start(f"worker{number}") for number in range(1, count + 1)]

    def _make_group(self, members: Sequence[Member], spec: ExecutorSpec) -> WorkerGroup:
        return WorkerGroup(members, spec.learner, self, self._reporter(), hire=self._start)

    def _start(self, label: str) -> Member:
        process = WorkerProcess()
        member = Member(
            label,
            process.link,
            process.pulse,
            socket.gethostname(),
            dismiss=lambda: self._kill(member),
            how_it_ended=process.how_it_ended,
            imports_main=True,
        )
        self._processes[member] = process
        return member

    def _kill(self, member: Member) -> None:
        if member in self._processes:
            self._processes[member].kill()
            self._end(member)

    def _end(self, member: Member) -> None:
        task = asyncio.ensure_future(self._processes.pop(member).stop())
        self._ending.add(task)
        task.add_done_callback(self._ending.discard)
