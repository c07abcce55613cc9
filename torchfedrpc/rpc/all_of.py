"""Awaiting several things that all have to come to their end."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Any


async def all_of(doing: Sequence[Awaitable[Any]], on_failure: Callable[[], None] | None = None) -> None:
    """Await all of them; if one fails, raise its error once all have ended."""
    tasks = [asyncio.ensure_future(one) for one in doing]
    if not tasks:
        return
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
        errors = [error for error in (task.exception() for task in done) if error is not None]
        if errors and on_failure is not None:
            on_failure()
        await asyncio.wait(tasks)
    finally:
        for task in tasks:
            task.cancel()
    if errors:
        try:
            raise errors[0]
        finally:  # its traceback has this frame: a circle that would keep what its steps held
            del doing, tasks, task, done, errors
