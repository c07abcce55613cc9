"""Pre-flight of the machines of a run: clocks that differ, and too few file descriptors, are warned about."""

from __future__ import annotations

import logging
import math
import socket
import sys
import time
from typing import Any

logger = logging.getLogger(__name__)

MAX_APART_S = 5.0  # a handshake takes less

# An idle driver has 32 open files and 8 more for each worker, an idle worker has 21; tensors on their way, worlds
# that are formed anew and files of users need more.
_DRIVER_FILES = 64
_FILES_PER_WORKER = 20
_WORKER_FILES = 64


def max_descriptors() -> int:
    """Return the number of files and sockets that this process may have open at once."""
    try:
        import resource  # noqa: PLC0415 - only Unix has it, and the package can be imported on other systems
    except ImportError:
        return sys.maxsize
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return sys.maxsize if limit == resource.RLIM_INFINITY else limit


def clocks_apart(about: dict[str, Any]) -> str | None:
    """Return how far the clock of a machine is from that of this one; None if that is of no consequence.

    Args:
        about: The description of a process on that machine, received just now.
    """
    ahead_s = about["time_s"] - time.time()
    if math.isfinite(ahead_s) and abs(ahead_s) < MAX_APART_S:
        return None
    return (
        f"the clock of {about['machine']} is {abs(ahead_s):.0f} s {'ahead of' if ahead_s > 0 else 'behind'} that of "
        f"{socket.gethostname()}: times in logs and traces do not agree; let a time service set both"
    )


def too_few_descriptors(about: dict[str, Any]) -> str | None:
    """Return the remedy if a worker may have too few files open; None if it may have enough."""
    limit = about["max_descriptors"]
    return None if limit >= _WORKER_FILES else _raise_limit(about["machine"], limit, "a worker", _WORKER_FILES)


def warn_about(about: dict[str, Any]) -> None:
    """Warn about the machine of a worker, by its description of itself, received just now."""
    for problem in (clocks_apart(about), too_few_descriptors(about)):
        if problem is not None:
            logger.warning("%s", problem)


def check_own_descriptors(num_workers: int) -> None:
    """Warn if this driver may have too few files open for its workers."""
    needed, limit = _DRIVER_FILES + _FILES_PER_WORKER * num_workers, max_descriptors()
    if limit < needed:
        who = f"a driver of {num_workers} workers"
        logger.warning("%s", _raise_limit(socket.gethostname(), limit, who, needed))


def _raise_limit(machine: str, limit: int, who: str, needed: int) -> str:
    return f"{limit} files may be open in a process on {machine}, and {who} needs {needed}: ulimit -n {needed}"
