"""Processes: what they have printed, their children, states and environment."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path

from folders import SUPPORT

_LAUNCHER_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "GROUP_WORLD_SIZE")


def environment() -> dict[str, str]:
    """The environment of this process without the variables of a launcher, and with this folder's modules."""
    kept = {name: value for name, value in os.environ.items() if name not in _LAUNCHER_VARIABLES}
    kept = {name: value for name, value in kept.items() if not name.startswith(("TORCHELASTIC", "GROUP_", "ROLE_"))}
    path = os.pathsep.join([str(SUPPORT), *filter(None, [kept.get("PYTHONPATH")])])
    return {**kept, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}


class Process:
    """A process with all that it has printed so far, on both streams; a thread reads it.

    Args:
        command: The program and its arguments.

    Attributes:
        process: The process.
        lines: The lines that it has printed.
    """

    def __init__(self, *command: str) -> None:
        self.process = subprocess.Popen(
            command,
            env=environment(),
            cwd=SUPPORT,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,  # Ctrl-C is for the process that starts it
        )
        self.lines: list[str] = []
        self._changed = threading.Condition()
        self._is_over = False
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    @property
    def pid(self) -> int:
        """The process id."""
        return self.process.pid

    @property
    def output(self) -> str:
        """The text that it has printed."""
        return "\n".join(self.lines)

    def line(self, part: str, count: int = 1, timeout_s: float = 60.0) -> str:
        """Wait for that many lines that contain a text; returns the last of these.

        Raises:
            AssertionError: If it ends, or the time is over, before they are printed.
        """
        try:
            found = self.line_or_end(part, count, timeout_s)
        except TimeoutError:
            found = None
        assert found is not None, self.output
        return found

    def line_or_end(self, part: str, count: int, timeout_s: float) -> str | None:
        """Wait for that many lines that contain a text; returns the last of these, or None if it ends before.

        Raises:
            TimeoutError: If neither happens in time.
        """

        def found() -> list[str]:
            return [line for line in self.lines if part in line]

        self._until(lambda: len(found()) >= count, timeout_s)
        return found()[count - 1] if len(found()) >= count else None

    def signal(self, number: signal.Signals) -> None:
        """Send a signal, if the process has not ended."""
        self.process.send_signal(number)

    def ended(self, timeout_s: float = 30.0) -> int:
        """Wait for the end; returns the exit status.

        Raises:
            subprocess.TimeoutExpired: If it does not end in time.
        """
        status = self.process.wait(timeout_s)
        self._reader.join(timeout_s)
        return status

    def close(self) -> None:
        """Kill the process, if it has not ended."""
        self.process.kill()
        self.process.wait()
        self._reader.join()
        assert self.process.stdout is not None
        self.process.stdout.close()

    def _until(self, met: Callable[[], bool], timeout_s: float) -> None:
        with self._changed:
            if not self._changed.wait_for(lambda: self._is_over or met(), timeout_s):
                raise TimeoutError

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            with self._changed:
                self.lines.append(line.rstrip())
                self._changed.notify_all()
        with self._changed:
            self._is_over = True
            self._changed.notify_all()


def children_of(pid: int) -> list[int]:
    """The children of a process that have not ended."""
    found: list[int] = []
    with contextlib.suppress(OSError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            found += map(int, (task / "children").read_text().split())
    return found


def command_of(pid: int) -> str:
    """The command line of a process; empty if it has ended."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_text(errors="replace").replace("\0", " ").strip()
    except OSError:
        return ""


def state_of(pid: int) -> str:
    """The letter that ``ps`` shows for the state of a process; X if it has ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return "X"


def is_alive(pid: int) -> bool:
    """Whether a process runs; a zombie does not."""
    return state_of(pid) not in "ZX"


def handles(pid: int, number: signal.Signals) -> bool:
    """Whether a process has a handler for a signal."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return False
    caught = next(int(line.split()[1], 16) for line in lines if line.startswith("SigCgt:"))
    return bool(caught >> (number - 1) & 1)
