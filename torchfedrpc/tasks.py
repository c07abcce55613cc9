"""Several tasks at once: in the background, all or none, all to their end."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine
from typing import Any

logger = logging.getLogger(__name__)


class Tasks:
    """Tasks in the background, which end together. An error of one is logged."""

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[None]] = set()

    def start(self, coroutine: Coroutine[Any, Any, None]) -> None:
        """Run a coroutine as a task."""
        task = asyncio.ensure_future(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._end)

    def cancel(self) -> None:
        """Cancel all tasks; `wait` awaits their ends."""
        for task in self._tasks:
            task.cancel()

    async def wait(self) -> None:
        """Wait until all tasks have ended."""
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _end(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            logger.error("a task of the run failed", exc_info=error)


async def all_of(*coroutines: Coroutine[Any, Any, Any]) -> list[Any]:
    """Run all coroutines. Returns their results. If one fails, cancel the others and raise its error.

    The error is in no reference cycle, so that the objects of the failed coroutine are freed with it.
    """
    error, tasks = None, []
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(coroutine) for coroutine in coroutines]
    except BaseExceptionGroup as errors:
        error = errors.with_traceback(None).exceptions[0]
    try:
        if error is not None:
            raise error
        return [task.result() for task in tasks]
    finally:
        del error, tasks


async def all_ended(tasks: list[asyncio.Task[None]]) -> None:
    """Wait for all tasks, remove them from the list, and raise the error of the first failed one.

    Cancelling the caller cancels the tasks.
    """
    answers = await asyncio.gather(*tasks, return_exceptions=True)
    tasks.clear()
    raise_first(answers)


def raise_first(answers: list[BaseException | None]) -> None:
    """Remove all answers from the list, and raise the first error.

    An error's traceback refers to the frames that it passes. If one of them had the error, or its task, they would
    keep each other and what else these frames have until the next garbage collection.
    """
    error = next((answer for answer in answers if answer is not None), None)
    answers.clear()
    try:
        if error is not None:
            raise error
    finally:
        del error
