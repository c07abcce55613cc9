"""Differences between Linux, macOS and Windows behind one interface."""

from __future__ import annotations

import os


def num_usable_cores() -> int:
    """Return the number of cores that this process may use, or of the machine if the system has no such limit."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
