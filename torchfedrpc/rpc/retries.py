"""How soon to try again to have a worker."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import TypeVar

from torchfedrpc.rpc.member import Member

T = TypeVar("T")

_FIRST_PAUSE_S = 0.25
_MAX_PAUSE_S = 2.0


class Retries:
    """Pauses between tries, by the worker's name: none before the first, then longer ones, up to 2 s."""

    def __init__(self) -> None:
        self._pauses_s: dict[str, float] = {}

    def lost(self, member: Member) -> None:
        """A worker is gone: the next try is the first again, unless it was there at once and of no use."""
        if member.has_served:
            self._pauses_s.pop(member.label, None)

    async def until_done(
        self,
        label: str,
        attempt: Callable[[], Awaitable[T]],
        failure: type[Exception],
        tell: Callable[[Exception], None],
    ) -> T:
        """Try until it goes well.

        Args:
            label: the worker's name.
            attempt: tries once.
            failure: what it raises where another try may go better.
            tell: is told of a failure, unless the one before said the same.
        """
        told = ""
        while True:
            await self._pause(label)
            try:
                return await attempt()
            except failure as error:
                if str(error) != told:
                    tell(error)
                told = str(error)

    async def _pause(self, label: str) -> None:
        pause_s = self._pauses_s.get(label, 0.0)
        self._pauses_s[label] = min(2 * pause_s, _MAX_PAUSE_S) or _FIRST_PAUSE_S
        await asyncio.sleep(pause_s)
