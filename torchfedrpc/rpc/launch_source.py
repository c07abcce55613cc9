"""The ranks of a launch as workers of one run: they stay for the next, and none takes a lost one's place."""

from __future__ import annotations

from collections.abc import Sequence

from torchfedrpc.config import RuntimeConfig
from torchfedrpc.rpc.launch import LaunchedWorkers
from torchfedrpc.rpc.member import Member
from torchfedrpc.rpc.source import Admit


class LaunchSource:
    """Lends the workers of a launch to a run.

    Args:
        workers: those of this process's launch.
        runtime: the run's configuration.
    """

    expects_workers = False
    replaces = False

    def __init__(self, workers: LaunchedWorkers, runtime: RuntimeConfig) -> None:
        self._workers = workers
        self._runtime = runtime

    async def gather(self) -> Sequence[Member]:
        """The ranks that are left, by rank."""
        return await self._workers.members(self._runtime)

    def start(self, admit: Admit) -> None:
        """Nobody comes later."""

    def lost(self, member: Member) -> bool:
        """None takes its place."""
        return False

    def abandon(self) -> None:
        """They stay."""

    async def close(self, reason: str) -> None:
        """They stay."""
