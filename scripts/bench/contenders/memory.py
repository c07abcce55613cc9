"""How much memory processes have, as Linux tells it; standard library only."""

from __future__ import annotations

import ctypes
import gc
import os
from pathlib import Path

_KB = 1e-3  # in MB, as everywhere here: 10**6 bytes


def resident_mb(pid: int | str = "self") -> float:
    """Memory that a process has now; 0 where it is gone."""
    return _status_mb(pid, "VmRSS")


def peak_mb() -> float:
    """The most memory that this process has had since `forget_peak`."""
    return _status_mb("self", "VmHWM")


def forget_peak() -> None:
    """Begin anew with this process's peak."""
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def give_back() -> None:
    """Return memory that is free to the system, so that the next that is needed shows."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)


def family_mb() -> float:
    """Memory that this process and all its descendants have now; pages that they share count for each."""
    children: dict[int, list[int]] = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            stat = (folder / "stat").read_text(encoding="utf-8")
        except OSError:  # it has ended
            continue
        parent = int(stat.rpartition(")")[2].split()[1])
        children.setdefault(parent, []).append(int(folder.name))
    family = [os.getpid()]
    for pid in family:  # it grows meanwhile
        family += children.get(pid, [])
    return sum(resident_mb(pid) for pid in family)


def _status_mb(pid: int | str, key: str) -> float:
    try:
        lines = Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines()
    except OSError:
        return 0.0
    return next((1.024 * _KB * int(line.split()[1]) for line in lines if line.startswith(f"{key}:")), 0.0)
