"""Distributed mode: workers are the other ranks of this launch, listening workers, and workers that join."""

from __future__ import annotations

from torchfedrpc.errors import ConfigError
from torchfedrpc.executors.base import ExecutorSpec
from torchfedrpc.executors.call_executor import CallExecutor
from torchfedrpc.executors.remote import RemoteLearners, sources_elsewhere
from torchfedrpc.registry import executor
from torchfedrpc.rpc.launch import current_workers


@executor("distributed")
class DistributedExecutor(CallExecutor):
    """Executor for ranks that serve under ``tfr.run``, and for workers elsewhere. Ranks stay for the next proxy."""

    def _make_learners(self, spec: ExecutorSpec) -> RemoteLearners:
        sources = sources_elsewhere(self.config)
        if (workers := current_workers()) is not None:
            sources = [workers, *sources]
        if not sources:
            raise ConfigError(
                "distributed mode needs the other ranks of a launch: start the script's main coroutine by "
                "tfr.run(main), and the script with torchrun --nproc-per-node=3 script.py; or workers that listen "
                "(client_endpoints with their addresses), or that join (runtime.join_at)"
            )
        return RemoteLearners(self.config, spec, sources, self._admission, self._durations)
