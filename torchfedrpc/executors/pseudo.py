"""Pseudo mode: workers are processes on this machine that the driver starts."""

from __future__ import annotations

import os

from torchfedrpc.executors.base import ExecutorSpec
from torchfedrpc.executors.call_executor import CallExecutor
from torchfedrpc.executors.placement import ClientEndpoint
from torchfedrpc.executors.remote import RemoteLearners, sources_elsewhere
from torchfedrpc.registry import executor
from torchfedrpc.rpc.sources import ProcessSource
from torchfedrpc.rpc.surroundings import Surroundings


@executor("pseudo")
class PseudoExecutor(CallExecutor):
    """Executor that starts ``num_processes`` workers on loopback, replaces lost ones, and ends them with the run."""

    def _make_learners(self, spec: ExecutorSpec) -> RemoteLearners:
        endpoints = {
            client: ClientEndpoint.parse(client, text) for client, text in self.config.client_endpoints.items()
        }
        elsewhere = {client for client, endpoint in endpoints.items() if endpoint.kind in ("local", "address")}
        count = self.config.num_processes or min(os.cpu_count() or 1, max(len(spec.clients) - len(elsewhere), 1))
        own = ProcessSource(count, Surroundings.of_this_process(fixed_hashes=True))
        sources = [own, *sources_elsewhere(self.config)]
        return RemoteLearners(self.config, spec, sources, self._admission, self._durations)
