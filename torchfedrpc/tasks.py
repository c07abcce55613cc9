"""Several tasks at once: in the background, all or none, all to their end, one after another; calls from threads."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine, Generator
from typing import Any, TypeVar

logger = logging.getLogger(__name__)

T = TypeVar("T")
F = TypeVar("F", bound=asyncio.Future[Any])


class Tasks:
    """Tasks in the background, which end together. An error of one is logged."""

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[Any]] = set()

    def start(self, coroutine: Coroutine[Any, Any, object]) -> None:
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

    def _end(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            logger.error("a task of the run failed", exc_info=error)


def begin(coroutine: Coroutine[Any, Any, T]) -> asyncio.Future[T]:
    """Run a coroutine up to its first wait at once, as its caller would, and the rest as a task.

    A task alone begins one step of the event loop later, behind what others submit in this step. The first part must
    not depend on the current task, as `asyncio.timeout` does.
    """
    future: asyncio.Future[T] = asyncio.get_running_loop().create_future()
    try:
        awaited = coroutine.send(None)
    except StopIteration as end:
        future.set_result(end.value)
    except Exception as error:
        future.set_exception(error)
    else:
        return asyncio.ensure_future(_Begun(coroutine, awaited))
    return future


class _Begun(Coroutine[Any, Any, T]):
    """A coroutine that has begun, and what it awaits."""

    def __init__(self, coroutine: Coroutine[Any, Any, T], awaited: Any) -> None:
        self._coroutine = coroutine
        self._awaited: list[Any] = [awaited]

    def send(self, value: Any) -> Any:
        return self._awaited.pop() if self._awaited else self._coroutine.send(value)

    def throw(self, *error: Any) -> Any:
        self._awaited.clear()
        try:
            return self._coroutine.throw(*error)
        finally:
            del error  # whose traceback has this frame

    def close(self) -> None:
        self._coroutine.close()

    def __await__(self) -> Generator[Any, Any, T]:
        raise NotImplementedError("a task runs it")


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


async def within(timeout_s: float | None, answer: Awaitable[T], late: Callable[[], Exception]) -> T:
    """Await an answer for some time, None for no limit, and raise an error that is made then if it did not come.

    The error is in no reference cycle with the running task, which `asyncio.timeout` refers to.
    """
    deadline: asyncio.Timeout | None = None
    try:
        async with asyncio.timeout(timeout_s) as deadline:
            return await answer
    except TimeoutError:
        assert deadline is not None
        if not deadline.expired():
            raise
    finally:
        deadline = None
    raise late()


async def all_ended(tasks: list[F]) -> None:
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
    error = None
    while answers and error is None:
        error = answers.pop(0)
    answers.clear()
    try:
        if error is not None:
            raise error
    finally:
        del error


class Turns:
    """FIFO lock."""

    __slots__ = ("_is_held", "_waiting")

    def __init__(self) -> None:
        self._is_held = False
        self._waiting: deque[asyncio.Future[None]] = deque()

    @property
    def is_held(self) -> bool:
        """Whether a caller holds the lock."""
        return self._is_held

    def take_now(self) -> bool:
        """Acquire the lock if it is free, and return whether it was."""
        if self._is_held:
            return False
        self._is_held = True
        return True

    def request(self, *, first: bool = False) -> asyncio.Future[None]:
        """Return a future that is done when the caller holds the lock.

        Args:
            first: Whether to queue the caller ahead of all waiting callers.
        """
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        if self.take_now():
            turn.set_result(None)
        elif first:
            self._waiting.appendleft(turn)
        else:
            self._waiting.append(turn)
        return turn

    async def take(self, *, first: bool = False) -> None:
        """Acquire the lock. A cancelled caller does not hold it."""
        await self.wait(self.request(first=first))

    async def wait(self, turn: asyncio.Future[None]) -> None:
        """Wait for a requested lock. A cancelled caller does not hold it."""
        try:
            await turn
        except asyncio.CancelledError:
            self.withdraw(turn)
            raise

    def withdraw(self, turn: asyncio.Future[None]) -> None:
        """Withdraw a request, or release the lock if the request was granted."""
        if turn.done() and not turn.cancelled():
            self.give()
        else:
            turn.cancel()

    def give(self) -> bool:
        """Release the lock to the first waiting caller, and return whether there was one."""
        while self._waiting:
            turn = self._waiting.popleft()
            if not turn.done():
                turn.set_result(None)
                return True
        self._is_held = False
        return False


def call_on(loop: asyncio.AbstractEventLoop, function: Callable[..., object], *args: Any) -> None:
    """Call a function on an event loop, from any thread. Ignored if the loop is closed."""
    with contextlib.suppress(RuntimeError):
        loop.call_soon_threadsafe(function, *args)
