"""Shutdown of a run by a signal: the main coroutine is cancelled, and the process ends within a time limit."""

from __future__ import annotations

import asyncio
import ctypes
import functools
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from torchfedrpc.host.deadlines import debugger_attached

T = TypeVar("T")

_BLOCKED_S = 0.5  # a main thread that does not return to its event loop within this time is interrupted
_FINISH_S = 1.5  # extra time for work that is nearly done, such as a round
_LIMIT_S = 3.0  # after the signal the process ends by then; the interpreter's shutdown takes extra time
_THREADS_S = 0.5
_LAST_S = 1.0
_DEFAULTS = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}


def run_interruptible(
    main: Callable[[], Coroutine[Any, Any, T]],
    *,
    notice: str = "",
    at_forced_end: Callable[[], object] | None = None,
) -> T:
    """Run a main coroutine as `asyncio.run` does; Ctrl-C and SIGTERM end it in order, and within 5 seconds.

    The first signal cancels the main coroutine, so that it can clean up: at once, or after the extra time that
    `Finishing` requests. A second signal of the same kind ends the process at once. Outside the main thread, and for
    a signal that already has a handler, nothing changes.

    Args:
        main: Returns the main coroutine.
        notice: A line written to stderr if a signal ends the run.
        at_forced_end: Called on another thread, for a second at most, before the process is ended because the main
            thread did not return in time.

    Raises:
        KeyboardInterrupt: If SIGINT arrived, even if the main coroutine suppressed its cancellation.
        SystemExit: If SIGTERM arrived; the exit status is 143.
        Exception: If the main coroutine raised it.
    """
    if threading.current_thread() is not threading.main_thread():
        return asyncio.run(main())
    interrupts = _Interrupts(notice, at_forced_end)
    with interrupts.handled():
        return asyncio.run(interrupts.follow(main))


@contextmanager
def cancelled_by_sigint() -> Iterator[None]:
    """Let SIGINT cancel the running task inside the block, if it would raise KeyboardInterrupt anywhere in the loop.

    Raises:
        KeyboardInterrupt: In place of the `asyncio.CancelledError`.
    """
    task, loop = asyncio.current_task(), asyncio.get_running_loop()
    assert task is not None
    if (
        threading.current_thread() is not threading.main_thread()
        or signal.getsignal(signal.SIGINT) is not signal.default_int_handler
    ):
        yield
        return
    num_signals = 0

    def handle(number: int, frame: object) -> None:
        nonlocal num_signals
        num_signals += 1
        loop.call_soon_threadsafe(task.cancel)  # which also wakes the loop

    signal.signal(signal.SIGINT, handle)
    try:
        yield
    except asyncio.CancelledError:
        if not num_signals:
            raise
        for _ in range(num_signals):
            task.uncancel()
        raise KeyboardInterrupt from None
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


class _Interrupts:
    """Handler of the signals that arrive during one run.

    Args:
        notice: The line for stderr, as in `run_interruptible`.
        at_forced_end: As in `run_interruptible`.
    """

    def __init__(self, notice: str, at_forced_end: Callable[[], object] | None) -> None:
        self._notice = notice
        self._at_forced_end = at_forced_end
        self._came: list[int] = []
        self._before: dict[int, Any] = {}
        self._main_thread = threading.get_ident()
        self._task: asyncio.Task[Any] | None = None
        self._loop_turns = self._forcing = self._is_cancelled = False
        self._timer: asyncio.TimerHandle | None = None
        self._over = threading.Event()
        self.finishing: set[Finishing] = set()

    async def follow(self, main: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """Run the main coroutine in the task that a signal cancels."""
        self._task = asyncio.current_task()
        return await main()

    @contextmanager
    def handled(self) -> Iterator[None]:
        """Handle signals inside the block; at its end raise the exception of the signal that arrived, if any."""
        cause: BaseException | None = None
        with self._watched():
            try:
                yield
            except BaseException as error:
                if not self._came or isinstance(error, KeyboardInterrupt):
                    raise
                cause = error
            finally:
                self._loop_turns = True
                _end_learner_threads()
                if self._came:
                    self._tell()
        if self._came:
            raise self._exception() from cause

    @contextmanager
    def _watched(self) -> Iterator[None]:
        global _current
        signals, wakeup = socket.socketpair()  # Windows accepts only a socket
        signals.setblocking(True)  # whatever socket.setdefaulttimeout says
        signals.setblocking(True)  # whatever socket.setdefaulttimeout says
        wakeup.setblocking(False)
        watcher = threading.Thread(target=self._watch, args=(signals,), name="torchfedrpc-interrupts", daemon=True)
        watcher.start()
        _leave_forks_alone()
        current_before, _current = _current, self
        wakeup_before = signal.set_wakeup_fd(wakeup.fileno(), warn_on_full_buffer=False)
        try:
            for number, default in _DEFAULTS.items():
                if signal.getsignal(number) == default:
                    self._before[number] = signal.signal(number, self._handle)
            yield
        finally:
            self._over.set()
            self.restore(wakeup_before)
            _current = current_before
            wakeup.close()
            watcher.join()
            signals.close()

    def restore(self, wakeup_fd: int = -1) -> None:
        """Restore the previous handlers, except those that the run has replaced."""
        signal.set_wakeup_fd(wakeup_fd)
        for number, handler in self._before.items():
            if signal.getsignal(number) == self._handle:
                signal.signal(number, handler)

    def _handle(self, number: int, frame: object) -> None:
        if self._forcing:
            self._forcing = False
            raise self._exception()
        if number in self._came:
            self._leave(number)
        self._came.append(number)
        if len(self._came) > 1:  # a launcher sends SIGTERM after Ctrl-C
            return
        if self._task is None:
            raise self._exception()
        if self._task.done():
            return
        for one in self.finishing:
            one.is_requested = True
        if not self.finishing:
            self.cancel()
        self._task.get_loop().call_soon_threadsafe(self._turned)  # also wakes an idle loop

    def _turned(self) -> None:
        self._loop_turns = True
        if self.finishing:
            self._timer = asyncio.get_running_loop().call_later(_FINISH_S, self.cancel)
        elif not self._is_cancelled:
            self.cancel()

    def cancel(self) -> None:
        """Cancel the main coroutine if it runs; only once, since it may be cleaning up."""
        self._is_cancelled = True
        if self._timer is not None:
            self._timer.cancel()
        if self._task is not None and not self._task.done():
            self._task.cancel()

    def _watch(self, signals: socket.socket) -> None:
        """Receive signals on a separate thread, which runs even while the main thread is in a long C call."""
        while byte := signals.recv(1):
            number = byte[0]
            if number in self._before:
                self._enforce(number)
                return

    def _enforce(self, number: int) -> None:
        """Interrupt a blocked main thread, then end the process."""
        blocked_s = _FINISH_S if self.finishing else _BLOCKED_S
        if self._over.wait(blocked_s):
            return
        if self._came and not self._loop_turns and not debugger_attached():
            self._forcing = True
            if hasattr(signal, "pthread_kill"):
                signal.pthread_kill(self._main_thread, number)  # wakes it from a system call
            else:  # Windows
                signal.raise_signal(number)
        if not self._over.wait(_LIMIT_S - blocked_s) and not debugger_attached():
            if self._at_forced_end is not None:  # it may wait for a lock that the main thread has
                last = threading.Thread(target=self._at_forced_end, daemon=True)
                last.start()
                last.join(_LAST_S)
            self._leave(number)

    def _leave(self, number: int) -> None:
        self._tell()
        os._exit(128 + number)

    def _tell(self) -> None:
        notice, self._notice = self._notice, ""
        if notice:
            os.write(2, f"{notice}\n".encode())  # the interrupted code may hold the lock of sys.stderr

    def _exception(self) -> BaseException:
        return KeyboardInterrupt() if self._came[0] == signal.SIGINT else SystemExit(128 + self._came[0])


_current: _Interrupts | None = None


class Finishing:
    """Request for extra time when a signal arrives: for the end of a round and its checkpoint.

    Between `__init__` and `close` the first signal sets ``is_requested`` instead of cancelling the run at once. It
    cancels the run after 1.5 s, or at the call of `done`. Outside `run_interruptible` ``is_requested`` stays False.
    """

    def __init__(self) -> None:
        self.is_requested = False
        self._interrupts = _current
        if _current is not None:
            _current.finishing.add(self)

    def done(self) -> None:
        """Cancel the run now, if a signal has arrived."""
        if self._interrupts is not None and self.is_requested:
            self._interrupts.cancel()

    def close(self) -> None:
        """Withdraw the request for extra time."""
        if self._interrupts is not None:
            self._interrupts.finishing.discard(self)


@functools.cache
def _leave_forks_alone() -> None:
    """Restore default signal handling in forked processes, such as those of a DataLoader."""

    def restore() -> None:
        if _current is not None:
            _current.restore()

    if hasattr(os, "register_at_fork"):  # Windows does not fork
        os.register_at_fork(after_in_child=restore)


def _end_learner_threads() -> None:
    """Stop running learner methods: a thread inside torch would break the shutdown of the interpreter."""
    deadline = time.monotonic() + _THREADS_S
    threads = [thread for thread in threading.enumerate() if thread.name.startswith("torchfedrpc-learners")]
    for thread in threads:
        assert thread.ident is not None
        ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident), ctypes.py_object(SystemExit))
    for thread in threads:
        thread.join(max(deadline - time.monotonic(), 0.0))
