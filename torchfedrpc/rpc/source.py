"""Where workers come from: each kind of worker has a source, and a run may have several."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from torchfedrpc.rpc.member import Member

Admit = Callable[[Member], None]


class Source(Protocol):
    """One kind of worker: processes of the driver's own, ranks of a launch, those that listen, those that join.

    All of it is called on the driver's event loop.

    Attributes:
        expects_workers: whether one may come that is not there now.
        replaces: whether it starts another itself in the place of one that is lost, under the same name.
    """

    expects_workers: bool
    replaces: bool

    async def gather(self) -> Sequence[Member]:
        """The workers to begin with; one without a name gets it from the run.

        Raises:
            ConfigError: some cannot be had, because of a setting.
            WorkerLostError: some are not there.
        """

    def start(self, admit: Admit) -> None:
        """From now on hand over whoever comes."""

    def lost(self, member: Member) -> bool:
        """A worker of this source is gone, lost or released; whether its place is kept for another of its name.

        Nobody is handed over before this has returned.
        """

    def abandon(self) -> None:
        """Opening was cut short: whoever is still starting need not."""

    async def close(self, reason: str) -> None:
        """Let all workers go; the run is over.

        Args:
            reason: why it ended early, which those that other machines have started end with; empty if it did not.
        """
