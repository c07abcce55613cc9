"""Streams over the items of a generator method: of an executor, and of a host."""

from __future__ import annotations

from typing import Any, Protocol

from torchfedrpc.host.call import Outcome
from torchfedrpc.wire.packing import Packed


class ItemStream(Protocol):
    """Open stream over the items of a learner's generator method."""

    async def step(self, value: Any = None) -> Any:
        """Send a value into the generator, and return the next item.

        Raises:
            StopAsyncIteration: If there is no further item.
            Exception: If the method raised it. The stream has ended then.
        """

    def close(self) -> None:
        """Close the generator, if it is open. The learner is free after the generator has ended."""


class Steps(Protocol):
    """Steps of a generator method in its host."""

    async def next(self, sent: Packed | None = None) -> Outcome:
        """Send a value, if any, and run the method up to its next item."""

    def close(self) -> None:
        """Close the generator if it is open."""
