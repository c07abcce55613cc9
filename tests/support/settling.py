"""Awaiting what an event loop has still to do."""

from __future__ import annotations

import asyncio
from typing import Any

TIMEOUT_S = 10.0


async def settled() -> None:
    """Let the loop run until all that is due has been done."""
    for _ in range(30):
        await asyncio.sleep(0)


async def within(awaitable: Any) -> Any:
    """Await something that must not take long."""
    async with asyncio.timeout(TIMEOUT_S):
        return await awaitable
