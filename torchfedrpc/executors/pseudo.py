"""Pseudo mode: workers are processes on this machine that the driver starts itself."""

from __future__ import annotations

import os
from collections.abc import Mapping

from torchfedrpc.executors.base import ExecutorSpec
from torchfedrpc.executors.placement import Endpoint
from torchfedrpc.executors.remote import RemoteExecutor
from torchfedrpc.registry import executor
from torchfedrpc.rpc.member import Member
from torchfedrpc.rpc.processes import WorkerProcess
from torchfedrpc.rpc.sources import ProcessSource, Source
from torchfedrpc.rpc.surroundings import Surroundings


@executor("pseudo")
class PseudoExecutor(RemoteExecutor):
    """Starts ``num_processes`` workers on loopback, others for those that are lost, and ends all with the run."""

    _own: ProcessSource

    def _make_sources(self, spec: ExecutorSpec) -> list[Source]:
        endpoints = {client: Endpoint.parse(client, text) for client, text in self.config.client_endpoints.items()}
        elsewhere = {client for client, endpoint in endpoints.items() if endpoint.kind in ("local", "address")}
        count = self.config.num_processes or min(os.cpu_count() or 1, max(len(spec.clients) - len(elsewhere), 1))
        self._own = ProcessSource(count, Surroundings.of_this_process(fixed_hashes=True))
        return [self._own, *super()._make_sources(spec)]

    @property
    def _processes(self) -> Mapping[Member, WorkerProcess]:
        return self._own.processes
