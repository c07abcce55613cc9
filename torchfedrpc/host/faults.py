"""Injected faults: kill, freeze, sever or slow this process as its n-th call begins."""

from __future__ import annotations

import math
import os
import signal
import subprocess
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from torchfedrpc.errors import ConfigError
from torchfedrpc.host.activity import Activity

FaultKind = Literal["kill", "freeze", "sever", "slow"]


@dataclass(frozen=True)
class Fault:
    """A fault, and the call at which it strikes. Its fields are plain JSON; ``Fault(**fields)`` makes it again.

    Attributes:
        kind: ``kill`` the process, ``freeze`` it, ``sever`` its heartbeat, or ``slow`` it down.
        at_call: Number of the call, from 1; the fault strikes when that call begins.
        seconds: Duration of ``freeze``, 0 for ever; delay of ``slow`` for that call and each later one.

    Raises:
        ConfigError: If the fields contradict each other.
    """

    kind: FaultKind
    at_call: int
    seconds: float = 0.0

    def __post_init__(self) -> None:
        if self.kind not in get_args(FaultKind):
            raise ConfigError(f"no fault is called {self.kind!r}: it is one of {', '.join(get_args(FaultKind))}")
        if not is_count(self.at_call) or self.at_call < 1:
            raise ConfigError(f"at_call counts the calls of a worker from 1, so it cannot be {self.at_call!r}")
        check_seconds(self.kind, self.seconds)


def is_count(value: object) -> bool:
    """Return whether a value is an integer and not a bool."""
    return isinstance(value, int) and not isinstance(value, bool)


def check_seconds(kind: FaultKind, seconds: float) -> None:
    """Check the duration of a fault.

    Raises:
        ConfigError: If the kind of fault cannot have this duration.
    """
    if isinstance(seconds, bool) or not isinstance(seconds, int | float) or not 0 <= seconds < math.inf:
        raise ConfigError(f"the seconds of a fault are a finite number above 0, not {seconds!r}")
    if kind == "slow" and seconds == 0:
        raise ConfigError("a slow worker needs seconds above 0: slow(worker, at_call=1, seconds=0.2)")
    if kind in ("kill", "sever") and seconds:
        raise ConfigError(f"{kind} is for good, so it has no seconds")


class Saboteur:
    """Injects faults into this process when its calls begin. Thread-safe.

    Args:
        faults: The faults.
        activity: Ends the heartbeats of this process; None in the driver, which sends none.
    """

    def __init__(self, faults: Sequence[Fault], activity: Activity | None) -> None:
        self._faults = tuple(faults)
        self._activity = activity
        self._begun: set[int] = set()
        self._lock = threading.Lock()

    def begin(self, call_id: int) -> None:
        """Count a call that is about to run on this thread, once if it is repeated, and strike if a fault is due."""
        with self._lock:
            if call_id in self._begun:
                return
            self._begun.add(call_id)
            num_begun = len(self._begun)
        for fault in self._faults:
            if num_begun == fault.at_call or (fault.kind == "slow" and num_begun > fault.at_call):
                self._strike(fault)

    def _strike(self, fault: Fault) -> None:
        if fault.kind == "kill":
            kill()
        elif fault.kind == "freeze":
            freeze(fault.seconds)
        elif fault.kind == "slow":
            time.sleep(fault.seconds)
        elif self._activity is not None:
            self._activity.sever()


def kill() -> None:
    """Kill this process."""
    os.kill(os.getpid(), signal.SIGKILL)


def freeze(seconds: float) -> None:
    """Stop this process (SIGSTOP), and continue it after some seconds; 0 for never."""
    if not seconds:
        # Sent to this thread: all threads stop with it. If another one took the signal, this one would run on first.
        signal.pthread_kill(threading.get_ident(), signal.SIGSTOP)
        return
    # The shell stops this process, so that it cannot continue it before it is stopped.
    script = 'kill -STOP "$1"; sleep "$0"; kill -CONT "$1"'
    subprocess.run(
        ["/bin/sh", "-c", script, f"{seconds:f}", str(os.getpid())],
        check=True,
        stdin=subprocess.DEVNULL,
        start_new_session=True,  # a Ctrl-C would end it and leave this process stopped for ever
    )
