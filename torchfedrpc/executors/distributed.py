"""Distributed mode: workers are the other ranks of this launch, on one machine or many."""

from __future__ import annotations

from collections.abc import Sequence

from torchfedrpc.errors import ConfigError
from torchfedrpc.executors.base import ExecutorSpec
from torchfedrpc.executors.remote import RemoteExecutor
from torchfedrpc.registry import executor
from torchfedrpc.rpc.backend import torch_rpc
from torchfedrpc.rpc.launch import current_workers
from torchfedrpc.rpc.member import Member


@executor("distributed")
class DistributedExecutor(RemoteExecutor):
    """Attaches to the ranks that ``tfr.run`` lets serve; they stay for the next proxy."""

    async def _gather(self, spec: ExecutorSpec) -> Sequence[Member]:
        torch_rpc()
        workers = current_workers()
        if workers is None:
            raise ConfigError(
                "distributed mode needs the other ranks of a launch: start the script's main coroutine by "
                "tfr.run(main), and the script with torchrun --nproc-per-node=3 script.py"
            )
        return await workers.members()
