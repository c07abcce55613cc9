"""How soon to try again to have a worker."""

from __future__ import annotations

import asyncio

_FIRST_PAUSE_S = 0.25
_MAX_PAUSE_S = 2.0


class Retries:
    """Pauses between tries, by the worker's name: none before the first, then longer ones, up to 2 s."""

    def __init__(self) -> None:
        self._pauses_s: dict[str, float] = {}

    def succeeded(self, label: str) -> None:
        """The next try is the first again."""
        self._pauses_s.pop(label, None)

    async def pause(self, label: str) -> None:
        """Wait until it is time to try."""
        pause_s = self._pauses_s.get(label, 0.0)
        self._pauses_s[label] = min(2 * pause_s, _MAX_PAUSE_S) or _FIRST_PAUSE_S
        await asyncio.sleep(pause_s)
