"""Distributed mode: workers are the other ranks of this launch, those that listen, and those that join."""

from __future__ import annotations

from torchfedrpc.errors import ConfigError
from torchfedrpc.executors.base import ExecutorSpec
from torchfedrpc.executors.remote import RemoteExecutor
from torchfedrpc.registry import executor
from torchfedrpc.rpc.launch import current_workers
from torchfedrpc.rpc.sources import LaunchSource, Source


@executor("distributed")
class DistributedExecutor(RemoteExecutor):
    """Attaches to the ranks that ``tfr.run`` lets serve, which stay for the next proxy, and to workers elsewhere."""

    def _make_sources(self, spec: ExecutorSpec) -> list[Source]:
        sources = super()._make_sources(spec)
        if (workers := current_workers()) is not None:
            return [LaunchSource(workers, self.config), *sources]
        if not sources:
            raise ConfigError(
                "distributed mode needs the other ranks of a launch: start the script's main coroutine by "
                "tfr.run(main), and the script with torchrun --nproc-per-node=3 script.py; or workers that listen "
                "(client_endpoints with their addresses), or that join (runtime.join_at)"
            )
        return sources
