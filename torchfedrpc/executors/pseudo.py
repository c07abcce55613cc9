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
from torchfedrpc.rpc.processes import WorkerProcess
from torchfedrpc.rpc.worker_group import Member


@executor("pseudo")
class PseudoExecutor(RemoteExecutor):
    """Starts ``num_processes`` workers on loopback and ends them with the run."""

    def __init__(self, config: RuntimeConfig | None = None) -> None:
        super().__init__(config)
        self._processes: list[WorkerProcess] = []

    async def close(self) -> None:
        """End the world and the processes."""
        try:
            await super().close()
        finally:
            processes, self._processes = self._processes, []
            await asyncio.gather(*(process.stop() for process in processes))

    async def _gather(self, spec: ExecutorSpec) -> Sequence[Member]:
        torch_rpc()  # refuse before any process is started
        num_clients = sum(self.config.client_endpoints.get(client_id) != LOCAL for client_id in spec.clients)
        count = self.config.num_processes or min(os.cpu_count() or 1, num_clients)
        for _ in range(count):
            self._processes.append(WorkerProcess())
        return [Member(process.link, socket.gethostname(), imports_main=True) for process in self._processes]
