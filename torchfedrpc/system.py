"""What differs between Linux, macOS and Windows, in one form for all of them."""

from __future__ import annotations

import os


def num_usable_cores() -> int:
    """The cores that this process may use; where the system does not tell, all of the machine's."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
