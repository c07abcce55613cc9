"""Processes, threads, descriptors, shared memory and temporary files that a run must not leave behind."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import re
import signal
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import leftovers
from processes import command_of

from chaos.report import Report
from torchfedrpc.rpc.processes import end_fork_server

_MARK = "TORCHFEDRPC_CHAOS"
_TIMEOUT_S = 10.0  # a worker has 4 s to stop, its heartbeat process 3 s more
_POLL_S = 0.05


@contextlib.contextmanager
def marked() -> Iterator[None]:
    """Mark all processes started from here on, orphans too, and give them a folder for temporary files.

    Processes that are there at the end are killed.
    """
    with tempfile.TemporaryDirectory(prefix="torchfedrpc-chaos-", ignore_cleanup_errors=True) as folder:
        os.environ[_MARK] = str(os.getpid())
        tempfile.tempdir = os.environ["TMPDIR"] = folder
        try:
            yield
        finally:
            _kill_marked()
            tempfile.tempdir = None
            del os.environ["TMPDIR"], os.environ[_MARK]


@contextlib.asynccontextmanager
async def nothing_left(report: Report) -> AsyncIterator[None]:
    """Report what is held at the end of this and was not at its beginning."""
    before = _held()
    yield
    report.left_over(sorted(await asyncio.to_thread(_left_over, before)))


def marked_processes() -> dict[int, str]:
    """The processes that bear the mark: process id -> command line."""
    mark = f"{_MARK}={os.getpid()}".encode()
    found: dict[int, str] = {}
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if entry.name.isdigit() and mark in (entry / "environ").read_bytes().split(b"\0"):
                found[int(entry.name)] = command_of(int(entry.name))[:100]
    return found


def _held() -> Counter[str]:
    # The thread pool of an event loop grows as it is used, up to its bound, and ends with the loop.
    threads = {name: count for name, count in leftovers.threads().items() if not re.fullmatch(r".*asyncio_\d+", name)}
    processes = Counter(f"process {pid} ({command})" for pid, command in marked_processes().items())
    others = leftovers.descriptors() + leftovers.shared_memory() + leftovers.temporary_files()
    return processes + Counter(threads) + others


def _left_over(before: Counter[str]) -> Counter[str]:
    """What is held beyond ``before``, after some seconds to end."""
    end_fork_server()  # which stays for the next proxy
    gc.collect()
    deadline = time.monotonic() + _TIMEOUT_S
    while (more := _held() - before) and time.monotonic() < deadline:
        time.sleep(_POLL_S)
    return more


def _kill_marked() -> None:
    deadline = time.monotonic() + _TIMEOUT_S
    while (found := marked_processes()) and time.monotonic() < deadline:  # one may be about to start another
        for pid in found:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(_POLL_S)
