"""What a run must not leave behind: processes, threads, descriptors, shared memory, temporary files."""

from __future__ import annotations

import contextlib
import gc
import os
import re
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

_MARK = "TORCHFEDRPC_CHAOS"
_TIMEOUT_S = 10.0  # a worker has 4 s to stop, its sidecar 3 s more
_POLL_S = 0.05
_KEPT = ("torchinductor_", "torchelastic_")  # torch's own, which it does not clean up


@contextlib.contextmanager
def marked() -> Iterator[None]:
    """Mark all processes that are started from here on, orphans too, and give them a folder of temporary files."""
    with tempfile.TemporaryDirectory(prefix="torchfedrpc-chaos-") as folder:
        os.environ[_MARK] = str(os.getpid())
        tempfile.tempdir = os.environ["TMPDIR"] = folder
        try:
            yield
        finally:
            tempfile.tempdir = None
            del os.environ["TMPDIR"], os.environ[_MARK]


def held() -> Counter[str]:
    """What this process and those it started hold now."""
    # A loop's pool of threads grows as it is used, up to its bound, and ends with the loop.
    pool = re.compile(r"asyncio_\d+")
    threads = Counter(f"thread {one.name}" for one in threading.enumerate() if not pool.fullmatch(one.name))
    return _processes() + threads + _descriptors() + _shared_memory() + _temporary_files()


def left_over(before: Counter[str]) -> Counter[str]:
    """What is held beyond what was before, after it has had some seconds to go."""
    gc.collect()
    deadline = time.monotonic() + _TIMEOUT_S
    while (more := held() - before) and time.monotonic() < deadline:
        time.sleep(_POLL_S)
    return more


def _processes() -> Counter[str]:
    mark = f"{_MARK}={os.getpid()}".encode()
    found: Counter[str] = Counter()
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if entry.name.isdigit() and mark in (entry / "environ").read_bytes().split(b"\0"):
                command = (entry / "cmdline").read_text(errors="replace").replace("\0", " ")
                found[f"process {entry.name} ({' '.join(command.split())[:100]})"] += 1
    return found


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
