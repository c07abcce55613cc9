"""What a run must not leave behind: processes, threads, descriptors, shared memory, temporary files."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import re
import signal
import tempfile
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

from chaos_report import Report

_MARK = "TORCHFEDRPC_CHAOS"
_TIMEOUT_S = 10.0  # a worker has 4 s to stop, its sidecar 3 s more
_POLL_S = 0.05
_KEPT = ("torchinductor_", "torchelastic_")  # torch's own, which it does not clean up


@contextlib.contextmanager
def marked() -> Iterator[None]:
    """Mark all processes that are started from here on, orphans too, and give them a folder of temporary files.

    Those that are there at the end are killed.
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
    """Tell what is held at the end of this and was not at its beginning."""
    before = _held()
    yield
    report.left_over(sorted(await asyncio.to_thread(_left_over, before)))


def _held() -> Counter[str]:
    """What this process and those it started hold now."""
    # A loop's pool of threads grows as it is used, up to its bound, and ends with the loop.
    pool = re.compile(r"asyncio_\d+")
    threads = Counter(f"thread {one.name}" for one in threading.enumerate() if not pool.fullmatch(one.name))
    return _processes() + threads + _descriptors() + _shared_memory() + _temporary_files()


def _left_over(before: Counter[str]) -> Counter[str]:
    """What is held beyond what was before, after it has had some seconds to go."""
    gc.collect()
    deadline = time.monotonic() + _TIMEOUT_S
    while (more := _held() - before) and time.monotonic() < deadline:
        time.sleep(_POLL_S)
    return more


def marked_processes() -> dict[int, str]:
    """The processes that bear the mark, from process id to command line."""
    mark = f"{_MARK}={os.getpid()}".encode()
    found: dict[int, str] = {}
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if entry.name.isdigit() and mark in (entry / "environ").read_bytes().split(b"\0"):
                command = (entry / "cmdline").read_text(errors="replace").replace("\0", " ")
                found[int(entry.name)] = " ".join(command.split())[:100]
    return found


def _kill_marked() -> None:
    deadline = time.monotonic() + _TIMEOUT_S
    while (found := marked_processes()) and time.monotonic() < deadline:  # one may be about to start another
        for pid in found:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(_POLL_S)


def _processes() -> Counter[str]:
    return Counter(f"process {pid} ({command})" for pid, command in marked_processes().items())


def _descriptors() -> Counter[str]:
    found: Counter[str] = Counter()
    for entry in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):
            target = os.readlink(entry)
            if not target.startswith("/proc/"):
                found[f"descriptor of {re.sub(r'[0-9]+', 'N', target)}"] += 1
    return found


def _shared_memory() -> Counter[str]:
    """Entries of /dev/shm, but for those of a living process that is none of ours."""
    found: Counter[str] = Counter()
    for entry in Path("/dev/shm").iterdir():
        maker = entry.name.split("_")[1] if entry.name.startswith("torch_") else ""
        if maker == str(os.getpid()) or not (maker.isdigit() and Path(f"/proc/{maker}").exists()):
            found[f"shared memory {entry.name}"] += 1
    return found


def _temporary_files() -> Counter[str]:
    folder = Path(tempfile.gettempdir())
    return Counter(f"temporary {entry.name}" for entry in folder.iterdir() if not entry.name.startswith(_KEPT))
