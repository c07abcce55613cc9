"""Interrupted cells: methods whose calls an interactive session has cancelled by SIGINT end too."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import os
import signal
import socket
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager

from torchfedrpc.interactive import is_interactive
from torchfedrpc.tasks import Tasks

logger = logging.getLogger(__name__)

_NUM_LOOKS, _LOOK_S = 20, 0.2  # until a method that goes on is given up
_wakes: int | None = None  # end of a socket pair to which the system writes the numbers of signals
_CHUNK_BYTES = 4096


@asynccontextmanager
async def ending_interrupted_methods(interrupt: Callable[[bool], Awaitable[Sequence[str]]]) -> AsyncIterator[None]:
    """Inside the block, end sync methods that go on although the user has interrupted their calls.

    The session itself cancels the calls of the interrupted cell. A sync method that was cancelled goes on, and calls
    of its process would wait for it.

    Args:
        interrupt: Raises KeyboardInterrupt, a second later, in each cancelled method that goes on, and returns where
            some do. Its argument is True after 4 s: then it replaces their processes if it can.
    """
    if not is_interactive() or threading.current_thread() is not threading.main_thread():
        yield
        return
    tasks = Tasks()

    async def end() -> None:
        running: Sequence[str] = ()
        # Workers may hear of the cancellation late: a notebook needs seconds to show an error on a busy machine.
        for _ in range(_NUM_LOOKS):
            await asyncio.sleep(_LOOK_S)
            running = await interrupt(False)
        if running and (running := await interrupt(True)):
            logger.warning(
                "a method on %s goes on although it was interrupted, as in a long call of C code: later calls wait "
                "for its end, unless another process takes the place of this one",
                ", ".join(running),
            )

    with _noticed(lambda: tasks.start(end())):
        try:
            yield
        finally:
            tasks.cancel()
            await tasks.wait()


@contextmanager
def _noticed(interrupted: Callable[[], None]) -> Iterator[None]:
    """Call a function on the running event loop after each SIGINT, also if another handler handles it."""
    global _wakes
    loop = asyncio.get_running_loop()
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.setblocking(False)
        theirs.setblocking(False)

        def read() -> None:
            numbers = ours.recv(_CHUNK_BYTES)
            if before >= 0:
                with contextlib.suppress(OSError):
                    os.write(before, numbers)
            if signal.SIGINT in numbers:
                interrupted()

        try:
            loop.add_reader(ours, read)
        except NotImplementedError:  # the loop of Windows
            yield
            return
        _reset_in_forks()
        _wakes = theirs.fileno()
        before = signal.set_wakeup_fd(_wakes, warn_on_full_buffer=False)
        try:
            yield
        finally:
            if (present := signal.set_wakeup_fd(before)) != _wakes:
                signal.set_wakeup_fd(present)
            _wakes = None
            if not loop.is_closed():
                loop.remove_reader(ours)


@functools.cache
def _reset_in_forks() -> None:
    """Let forked processes, such as those of a DataLoader, report their signals to this process no more."""

    def forget() -> None:
        if _wakes is not None and (present := signal.set_wakeup_fd(-1)) != _wakes:
            signal.set_wakeup_fd(present)

    if hasattr(os, "register_at_fork"):  # Windows does not fork
        os.register_at_fork(after_in_child=forget)
