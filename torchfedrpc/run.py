"""Entry point of scripts: runs a coroutine on the driver and serves learners on the other ranks of a launch."""

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
from torchfedrpc.launcher import Launch, check_is_driver, hidden_from_learners, is_process_of_rank
from torchfedrpc.proxy import LearnerProxy
from torchfedrpc.signals import cancelled_by_sigint, run_interruptible

P = ParamSpec("P")
T = TypeVar("T")


def run(main: Callable[P, Coroutine[Any, Any, T]], *args: P.args, **kwargs: P.kwargs) -> T | None:
    """Run a federation's main coroutine.

    A script that ends with ``tfr.run(main)`` runs under ``python script.py`` and under ``torchrun script.py``. On
    rank 0, or without a launcher, this runs ``main(*args, **kwargs)`` and returns its result. The other ranks of a
    launch serve learners until rank 0 ends, then return None. If ``main`` fails, they end with a non-zero exit status
    when rank 0 ends.

    Ctrl-C (SIGINT) and SIGTERM cancel ``main``, close everything, and end the process within 5 s. A second signal of
    the same kind ends it at once. Signal handlers that the script has installed are left in place.

    Raises:
        ConfigError: If ``main`` is not a coroutine function, an event loop is already running, or a worker process
            calls this while it imports the script.
        KeyboardInterrupt: If SIGINT arrived; on rank 0.
        SystemExit: If SIGTERM arrived; on rank 0. The exit status is 143.
        Exception: If ``main`` raised it; on rank 0.
    """
    _check_main(main, "tfr.run")
    if asyncio._get_running_loop() is not None:
        raise ConfigError(
            f"tfr.run starts an event loop, and one is running here already, as in a notebook: write "
            f"await tfr.run_async({main.__name__}, ...) instead, or call tfr.run outside of coroutines"
        )
    return drive(lambda: run_interruptible(lambda: main(*args, **kwargs)))


async def run_async(main: Callable[P, Coroutine[Any, Any, T]], *args: P.args, **kwargs: P.kwargs) -> T:
    """Run a federation's main coroutine in the running event loop, as in a cell of a notebook.

    Compared with ``await main(...)`` this closes a proxy that ``main`` has left open, also after an error, and lets
    SIGINT cancel ``main`` where the session does not: in IPython on a terminal.

    Raises:
        ConfigError: If ``main`` is not a coroutine function, if this process is a worker, or in a launch of several
            ranks, which `run` starts.
        KeyboardInterrupt: If SIGINT arrived and cancelled ``main``.
        Exception: If ``main`` raised it.
    """
    _check_main(main, "tfr.run_async")
    if check_is_driver() is not None:
        raise ConfigError(
            "tfr.run_async runs in the event loop of a notebook: tfr.run(main) starts the ranks of a launch"
        )
    before = LearnerProxy.current()
    try:
        with cancelled_by_sigint():
            return await main(*args, **kwargs)
    finally:
        if (proxy := LearnerProxy.current()) is not None and proxy is not before:
            await proxy.close()


def _check_main(main: object, runner: str) -> None:
    if not inspect.iscoroutinefunction(main):
        raise ConfigError(f"{runner} needs a coroutine function: async def main(): ..., not {main!r}")


def drive(job: Callable[[], T]) -> T | None:
    """Run a plain function that starts event loops itself, in the way of `run`."""
    launch = Launch.from_environment()
    if launch is None:
        check_is_driver()
        return job()
    from torchfedrpc.rpc import launch as ranks  # noqa: PLC0415, slow to import, and local runs do not need it
    from torchfedrpc.rpc import worker  # noqa: PLC0415

    if launch.rank != 0:
        cancel_end_report()  # from here on failures reach the driver over the control link
        with _ended_by_ctrl_c():
            link = ranks.dial_driver(launch)
        with hidden_from_learners(launch):
            is_clean = worker.serve_launch(link, launch.local_rank).is_clean
        if not is_clean:
            _exit_at_once()
        return None
    check_is_driver()
    with ranks.driving(launch), hidden_from_learners(launch):
        return job()


_is_report_due = True  # whether this rank reports the end of its script to the driver


def cancel_end_report() -> None:
    """Cancel the report of this rank to the driver at the end of its script."""
    global _is_report_due
    _is_report_due = False


def report_end_of_script() -> None:
    """Install hooks that report a rank's script to the driver if it ends before `run`; called at import.

    Without the report the driver would wait for that rank in vain: torchrun does not notify the machines of a launch
    when one fails. Rank 0, processes outside a launch, and child processes of a rank get no hooks.
    """
    if not is_process_of_rank():
        return
    before = sys.excepthook

    def hook(kind: type[BaseException], error: BaseException, where: TracebackType | None) -> None:
        before(kind, error, where)
        if isinstance(error, Exception):
            _tell_driver(error)
        else:  # Ctrl-C: the launcher forwards it to the driver as well
            cancel_end_report()

    sys.excepthook = hook
    atexit.register(_tell_driver, None)  # sys.exit does not reach the hook


def _tell_driver(error: Exception | None) -> None:
    if not (_is_report_due and is_process_of_rank()):  # a forked child of the rank inherits the hooks
        return
    cancel_end_report()
    try:
        launch = Launch.from_environment()
        if launch is not None and launch.is_last_attempt:
            from torchfedrpc.rpc.launch import tell_script_ended  # noqa: PLC0415

            tell_script_ended(launch, error)
    except (ConfigError, RuntimeError) as problem:  # for example if there is no store
        print(f"the driver could not be told that the script of this rank has ended: {problem}", file=sys.stderr)


@contextmanager
def _ended_by_ctrl_c() -> Iterator[None]:
    """Let SIGINT end this process without Python's handler: a wait for the launcher's store blocks Python."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _exit_at_once() -> None:
    """End the process at once: a running learner method would break the shutdown of the interpreter."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
