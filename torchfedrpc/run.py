"""The entry: runs a coroutine on the driver, and lets every other rank of a launch serve learners."""

from __future__ import annotations

import asyncio
import atexit
import inspect
import os
import signal
import sys
import threading
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any, ParamSpec, TypeVar

from torchfedrpc.errors import ConfigError
from torchfedrpc.launcher import Launch, check_is_driver, is_process_of_rank
from torchfedrpc.signals import run_interruptible

P = ParamSpec("P")
T = TypeVar("T")


def run(main: Callable[P, Coroutine[Any, Any, T]], *args: P.args, **kwargs: P.kwargs) -> T | None:
    """Run a federation's main coroutine.

    A script that ends with ``tfr.run(main)`` runs under ``python script.py`` and under ``torchrun script.py``
    alike. On rank 0, or without a launcher, ``main(*args, **kwargs)`` runs and its result is returned. The other
    ranks of a launch serve learners until rank 0 ends, then return None; where ``main`` fails they end, with a
    non-zero exit status, when rank 0 does.

    On Ctrl-C (SIGINT) and SIGTERM ``main`` is cancelled, everything is closed, and the process is gone within 5 s;
    a second signal of the same kind ends it at once. Handlers of the script's own are left in place.

    Raises:
        ConfigError: ``main`` is no coroutine function, an event loop is running already, or a worker process calls
            this as it imports the script.
        KeyboardInterrupt: on rank 0, SIGINT came.
        SystemExit: on rank 0, SIGTERM came; the exit status is 143.
        Exception: on rank 0, whatever ``main`` raised.
    """
    if not inspect.iscoroutinefunction(main):
        raise ConfigError(f"tfr.run needs a coroutine function: async def main(): ..., not {main!r}")
    if asyncio._get_running_loop() is not None:
        raise ConfigError(
            f"tfr.run starts an event loop, and one is running here already, as in a notebook: write "
            f"await {main.__name__}(...) instead, or call tfr.run outside of coroutines"
        )
    return drive(lambda: run_interruptible(lambda: main(*args, **kwargs)))


def drive(job: Callable[[], T]) -> T | None:
    """What `run` does, for a plain function that starts its own event loops."""
    launch = Launch.from_environment()
    if launch is None:
        check_is_driver()
        return job()
    from torchfedrpc.rpc import launch as ranks  # noqa: PLC0415, local runs do without what takes long to import
    from torchfedrpc.rpc import worker  # noqa: PLC0415

    if launch.rank != 0:
        leave_no_word()  # what fails from now on is told by other ways
        with _ended_by_ctrl_c():
            link = ranks.dial_driver(launch)
        if not worker.serve_launch(link, launch.local_rank).is_clean:
            _leave_behind()
        return None
    check_is_driver()
    with ranks.driving(launch):
        return job()


_is_word_due = True  # of this rank to the driver, where its script ends


def leave_no_word() -> None:
    """Let the script of this rank end without a word to the driver."""
    global _is_word_due
    _is_word_due = False


def tell_of_ending_script() -> None:
    """Let a rank whose script ends before it comes to `run` say so to the driver; for the import of the library.

    The driver would wait for that rank in vain: torchrun does not tell the machines of a launch when one fails.
    Rank 0, a process of no launch, and the processes that a rank starts are left as they are.
    """
    if not is_process_of_rank():
        return
    before = sys.excepthook

    def hook(kind: type[BaseException], error: BaseException, where: TracebackType | None) -> None:
        before(kind, error, where)
        if isinstance(error, Exception):
            _tell_driver(error)
        else:  # Ctrl-C, which the launcher passes on to the driver too
            leave_no_word()

    sys.excepthook = hook
    atexit.register(_tell_driver, None)  # sys.exit does not come to the hook


def _tell_driver(error: Exception | None) -> None:
    if not (_is_word_due and is_process_of_rank()):  # this may be a child that the rank has forked
        return
    leave_no_word()
    try:
        launch = Launch.from_environment()
        if launch is not None and launch.is_last_attempt:
            from torchfedrpc.rpc.launch import tell_script_ended  # noqa: PLC0415

            tell_script_ended(launch, error)
    except (ConfigError, RuntimeError) as problem:  # no store, for one
        print(f"the driver could not be told that the script of this rank has ended: {problem}", file=sys.stderr)


@contextmanager
def _ended_by_ctrl_c() -> Iterator[None]:
    """Let SIGINT end this process where it stands: a wait for the launcher's store would not come back for Python."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _leave_behind() -> None:
    """End at once: a learner's method goes on regardless, and its thread would break the interpreter's end."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
