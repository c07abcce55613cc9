"""Driver side of a stream: one step per requested item."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any, Protocol

from torchfedrpc.host.call import Outcome


class Steps(Protocol):
    """Steps of a generator method in its host."""

    async def next(self) -> Outcome:
        """Run the method up to its next item."""

    def close(self) -> None:
        """Close the generator if it is open."""


class CallStream:
    """Open stream over the items of a learner's generator method.

    Args:
        steps: The steps of the method.
        passed: Awaited before the first step.
        result: Returns the item of an outcome, or raises its error.
    """

    def __init__(self, steps: Steps, passed: Callable[[], Awaitable[None]], result: Callable[[Outcome], Any]) -> None:
        self._steps = steps
        self._passed = passed
        self._result = result
        self._is_begun = self._ended = self._closed = False

    async def step(self) -> Any:
        """Return the next item.

        Raises:
            StopAsyncIteration: If there is no further item.
            Exception: If the method raised it. The stream has ended then.
        """
        if self._ended or self._closed:
            raise StopAsyncIteration
        try:
            if not self._is_begun:
                await self._passed()
                if self._closed:
                    raise StopAsyncIteration
            self._is_begun = True
            outcome = await self._steps.next()
        except BaseException:
            self._ended = True
            raise
        self._ended = outcome.kind != "item"
        if outcome.kind == "end" or self._closed:
            raise StopAsyncIteration
        return self._result(outcome)

    def close(self) -> None:
        """Close the generator on its host, if it is open. The learner is free after the generator has ended."""
        if self._is_begun and not self._ended and not self._closed:
            self._steps.close()
        self._closed = True
