"""What a process holds, to check that it holds no more later: children, threads, descriptors, memory, files."""

from __future__ import annotations

import contextlib
import os
import re
import tempfile
import threading
from collections import Counter
from pathlib import Path

import torch
import warm_python
from processes import children_of, command_of

from torchfedrpc.rpc.processes import current_fork_server

# torch does not remove these; before 2.7 its import also makes a folder, which a killed process leaves.
_HAS_OLD_TORCH = tuple(map(int, torch.__version__.split(".")[:2])) < (2, 7)
_KEPT = ("torchinductor_", "torchelastic_", *(["tmp"] if _HAS_OLD_TORCH else []))


def held() -> Counter[str]:
    """Everything below."""
    if not Path("/proc/self/fd").exists():  # another system than Linux
        return threads() + temporary_files()
    return children() + threads() + descriptors() + shared_memory() + temporary_files()


def children() -> Counter[str]:
    """The children of this process."""
    return Counter(
        f"process {pid}: {command_of(pid)[:80]}"
        for pid in set(children_of(os.getpid())) - {*_servers(), *warm_python.waiting}
    )


def _servers() -> dict[int, str]:
    """The processes that fork others and stay, the library's and the tests': process id -> this process's socket."""
    servers = [server for server in (current_fork_server(), warm_python.current_server()) if server is not None]
    return {server.popen.pid: os.readlink(f"/proc/self/fd/{server.control.fileno()}") for server in servers}


def threads() -> Counter[str]:
    """The threads of this process."""
    return Counter(f"thread {thread.name}" for thread in threading.enumerate())


def descriptors() -> Counter[str]:
    """The open files, sockets and pipes of this process."""
    found: Counter[str] = Counter()
    kept = set(_servers().values())
    for entry in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):
            target = os.readlink(entry)
            is_font = target.endswith(".ttf")  # which matplotlib keeps open
            if not target.startswith("/proc/") and target not in kept and not is_font:
                found[f"descriptor {target}"] += 1
    return found


def shared_memory() -> Counter[str]:
    """Entries of /dev/shm, except those of other living processes."""
    found: Counter[str] = Counter()
    for entry in Path("/dev/shm").iterdir():
        named = re.match(r"(?:torch_|joblib_memmapping_folder_|sem\.loky-)(\d+)", entry.name)
        if named is None or named[1] == str(os.getpid()) or not Path(f"/proc/{named[1]}").exists():
            found[f"shared memory {entry.name}"] += 1
    return found


def temporary_files() -> Counter[str]:
    """Entries of the folder for temporary files."""
    folder = Path(tempfile.gettempdir())
    return Counter(f"temporary {entry}" for entry in folder.iterdir() if not entry.name.startswith(_KEPT))
