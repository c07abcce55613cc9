"""The entry: runs a coroutine on the driver, and lets every other rank of a launch serve learners."""

from __future__ import annotations

import asyncio
import inspect
import os
import sys
from collections.abc import Callable, Coroutine
from typing import Any, ParamSpec, TypeVar

from torchfedrpc.errors import ConfigError
from torchfedrpc.launcher import Launch, check_is_driver
from torchfedrpc.rpc.launch import dial_driver, driving
from torchfedrpc.rpc.worker import serve

P = ParamSpec("P")
T = TypeVar("T")


def run(main: Callable[P, Coroutine[Any, Any, T]], *args: P.args, **kwargs: P.kwargs) -> T | None:
    """Run a federation's main coroutine.

    A script that ends with ``tfr.run(main)`` runs under ``python script.py`` and under ``torchrun script.py``
    alike. On rank 0, or without a launcher, ``main(*args, **kwargs)`` runs and its result is returned. The other
    ranks of a launch serve learners until rank 0 ends, then return None; where ``main`` fails they end, with a
    non-zero exit status, when rank 0 does.

    Raises:
        ConfigError: ``main`` is no coroutine function, or a worker process calls this as it imports the script.
        Exception: on rank 0, whatever ``main`` raised.
    """
    if not inspect.iscoroutinefunction(main):
        raise ConfigError(f"tfr.run needs a coroutine function: async def main(): ..., not {main!r}")
    return drive(lambda: asyncio.run(main(*args, **kwargs)))


def drive(job: Callable[[], T]) -> T | None:
    """What `run` does, for a plain function that starts its own event loops."""
    launch = Launch.from_environment()
    if launch is not None and launch.rank != 0:
        if not serve(dial_driver(launch), launch.local_rank):
            _leave_behind()
        return None
    check_is_driver()
    if launch is None:
        return job()
    with driving(launch):
        return job()


def _leave_behind() -> None:
    """End at once: a learner's method goes on regardless, and its thread would break the interpreter's end."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
