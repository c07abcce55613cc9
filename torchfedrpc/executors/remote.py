"""What pseudo and distributed mode have in common: learners on worker ranks, reached by torch RPC."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

from torchfedrpc.config import RuntimeConfig
from torchfedrpc.executors.base import CallExecutor, ExecutorSpec
from torchfedrpc.executors.placement import place_clients
from torchfedrpc.host.call import Call
from torchfedrpc.host.mailbox import Reply
from torchfedrpc.rpc.remote_host import RemoteHost
from torchfedrpc.rpc.worker_group import Member, WorkerGroup


class RemoteExecutor(CallExecutor):
    """Places clients on workers and sends their calls there.

    Args:
        config: the run's configuration.
    """

    def __init__(self, config: RuntimeConfig | None = None) -> None:
        super().__init__(config)
        self._group: WorkerGroup | None = None
        self._places: dict[str, int] = {}

    async def open(self, spec: ExecutorSpec) -> None:
        """Gather the workers, form a world with them and place the clients."""
        await super().open(spec)
        members = await self._gather(spec)
        machines = [member.machine for member in members]
        self._places = place_clients(list(spec.clients), self.config.client_endpoints, machines)
        self._group = WorkerGroup(members, spec.learner)
        await self._group.form(spec.reporter())

    async def close(self) -> None:
        """End the world."""
        if self._group is not None:
            await self._group.disband()
            self._group = None

    def worker_of(self, client_id: str) -> str:
        """``worker1`` and so on."""
        return f"worker{self._places[client_id] + 1}"

    def stats(self) -> dict[str, Any]:
        """Bytes of arguments sent and results received, and for each worker how many learners it has."""
        hosts = self._group.hosts if self._group is not None else []
        return {
            "bytes_sent": sum(host.num_sent_bytes for host in hosts),
            "bytes_received": sum(host.num_received_bytes for host in hosts),
            "workers": {host.label: {"learners": len(host)} for host in hosts},
        }

    @abstractmethod
    async def _gather(self, spec: ExecutorSpec) -> Sequence[Member]:
        """The workers, by rank."""

    def _submit(self, call: Call, reply: Reply) -> None:
        host = self._host(call)
        if call.client_id not in host:
            host.register(call.client_id, self._spec.constructor_arguments(call.client_id))
        host.submit(call, reply)

    def _advance(self, call: Call, reply: Reply) -> None:
        self._host(call).advance(call, reply)

    def _cancel(self, call: Call) -> None:
        if self._group is not None and self._group.hosts:
            self._host(call).cancel(call)

    def _host(self, call: Call) -> RemoteHost:
        if self._group is None:
            raise RuntimeError("this executor is not open: await executor.open(spec) first")
        return self._group.hosts[self._places[call.client_id]]
