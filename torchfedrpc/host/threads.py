"""Threads of a host: some that run sync methods, and one with an event loop for async methods."""

from __future__ import annotations

import asyncio
import contextvars
import logging
import queue
import threading
from collections.abc import Callable, Coroutine
from functools import partial
from typing import Any

from torchfedrpc.host.call import Outcome
from torchfedrpc.host.call_scope import outside
from torchfedrpc.host.host_loop import HostLoop
from torchfedrpc.host.process_state import ProcessState

logger = logging.getLogger(__name__)


class SyncThreads:
    """Threads that run functions in the order in which they are put.

    They are daemons, so that a method that never ends does not keep the process alive.

    Args:
        num_threads: Number of functions that run concurrently.
        process: State of the process, from which each thread has its settings.
    """

    def __init__(self, num_threads: int, process: ProcessState) -> None:
        self._jobs: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._process = process
        self._threads = [
            threading.Thread(target=self._run, name=f"torchfedrpc-learners-{number}", daemon=True)
            for number in range(num_threads)
        ]
        for thread in self._threads:
            thread.start()

    @property
    def num_waiting(self) -> int:
        """Number of functions that wait."""
        return self._jobs.qsize()

    def put(self, job: Callable[[], None]) -> None:
        """Append a function to the queue."""
        self._jobs.put(job)

    def close(self, timeout_s: float) -> bool:
        """End the threads after the queued functions. Returns whether all ended in time."""
        for _ in self._threads:
            self._jobs.put(None)
        for thread in self._threads:
            thread.join(timeout_s)
        return not any(thread.is_alive() for thread in self._threads)

    def _run(self) -> None:
        self._process.prepare_thread()
        while (job := self._jobs.get()) is not None:
            try:
                job()
            except Exception:  # jobs handle errors of learners themselves
                logger.exception("a job of a learner host failed")
            job = None  # do not keep its arguments while waiting


class AsyncThread:
    """A thread with an event loop, started when the first coroutine needs it.

    Args:
        process: State of the process, from which the thread has its settings.
    """

    def __init__(self, process: ProcessState) -> None:
        self._process = process
        self._loop: HostLoop | None = None
        self._thread: threading.Thread | None = None
        self._lock = threading.Lock()
        self._tasks: set[asyncio.Task[Outcome]] = set()
        self._finishing: asyncio.Task[None] | None = None  # kept, since the loop keeps no strong reference
        self._closed = False

    def start(
        self, coroutine: Coroutine[Any, Any, Outcome], context: contextvars.Context, ended: Callable[[Outcome], None]
    ) -> None:
        """Run a coroutine as a task on the loop's thread. Ignored if the thread was closed.

        Args:
            coroutine: The coroutine.
            context: Context of the call's scope.
            ended: Receives the outcome, outside of that scope.
        """
        if self._closed:
            coroutine.close()
        else:
            self.call(partial(self._start, coroutine, context, ended))

    def call(self, function: Callable[[], object]) -> None:
        """Call a function on the loop's thread."""
        with self._lock:
            if self._loop is None:
                self._loop = outside().run(HostLoop)
                self._thread = threading.Thread(target=self._run, name="torchfedrpc-async", daemon=True)
                self._thread.start()
            self._loop.call_soon_threadsafe(function, context=outside())

    def present_task(self) -> tuple[int, asyncio.Task[Any] | None]:
        """Return the thread's identifier, and the task whose step runs there now, if any."""
        if self._loop is None or self._thread is None or self._thread.ident is None:
            return 0, None
        return self._thread.ident, asyncio.current_task(self._loop)

    def close(self, timeout_s: float) -> bool:
        """Wait for the tasks, cancel the remaining ones, and end the thread. Returns whether it ended in time."""
        self._closed = True
        if self._loop is None or self._thread is None:
            return True
        loop = self._loop
        self.call(partial(self._begin_to_finish, loop, timeout_s / 2))
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _start(
        self, coroutine: Coroutine[Any, Any, Outcome], context: contextvars.Context, ended: Callable[[Outcome], None]
    ) -> None:
        task = asyncio.get_running_loop().create_task(coroutine, context=context)
        self._tasks.add(task)  # the loop itself keeps no strong reference
        task.add_done_callback(partial(self._ended, ended), context=outside())

    def _ended(self, ended: Callable[[Outcome], None], task: asyncio.Task[Outcome]) -> None:
        self._tasks.discard(task)
        ended(Outcome("cancelled") if task.cancelled() else task.result())

    def _begin_to_finish(self, loop: HostLoop, timeout_s: float) -> None:
        self._finishing = loop.create_task(self._finish(timeout_s))

    async def _finish(self, timeout_s: float) -> None:
        loop = asyncio.get_running_loop()
        try:
            if self._tasks:  # cancelled tasks may clean up
                await asyncio.wait(self._tasks, timeout=timeout_s)
            others = asyncio.all_tasks() - {asyncio.current_task()}  # that learners have started
            for task in others:
                task.cancel()
            await asyncio.gather(*others, return_exceptions=True)
            await loop.shutdown_asyncgens()
        finally:
            loop.call_soon(loop.stop)

    def _run(self) -> None:
        assert self._loop is not None
        self._process.prepare_thread()
        while True:
            try:
                self._loop.run_forever()
                self._loop.close()
                return
            except BaseException:  # a task that a learner started let SystemExit through
                logger.exception("a learner's task tried to end the event loop of its host")
