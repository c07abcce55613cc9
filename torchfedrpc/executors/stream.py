"""Streams over the items of a generator method: of an executor, and of a host."""

from __future__ import annotations

from typing import Any, Protocol

from torchfedrpc.host.call import Outcome


class ItemStream(Protocol):
    """Open stream over the items of a learner's generator method."""

    async def step(self) -> Any:
        """Return the next item.

        Raises:
            StopAsyncIteration: If there is no further item.
            Exception: If the method raised it. The stream has ended then.
        """

    def close(self) -> None:
        """Close the generator, if it is open. The learner is free after the generator has ended."""


class Steps(Protocol):
    """Steps of a generator method in its host."""

    async def next(self) -> Outcome:
        """Run the method up to its next item."""

    def close(self) -> None:
        """Close the generator if it is open."""
