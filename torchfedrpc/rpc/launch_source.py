"""The ranks of a launch as workers of one run: they stay for the next, and none takes a lost one's place."""

from __future__ import annotations

from collections.abc import Sequence

from torchfedrpc.rpc.launch import LaunchedWorkers
from torchfedrpc.rpc.member import Member
from torchfedrpc.rpc.source import Admit


class LaunchSource:
    """Lends the workers of a launch to a run.

    Args:
        workers: those of this process's launch.
    """

    expects_workers = False
    replaces = False

    def __init__(self, workers: LaunchedWorkers) -> None:
        self._workers = workers

    async def gather(self, *, is_only: bool) -> Sequence[Member]:
        """The ranks that are left, by rank."""
        return await self._workers.members()

    def start(self, admit: Admit) -> None:
        """Nobody comes later."""

    def lost(self, member: Member) -> bool:
        """None takes its place."""
        return False

    def abandon(self) -> None:
        """They stay."""

    async def close(self) -> None:
        """They stay."""
