"""Processes: what they have printed, their children, states and environment."""

from __future__ import annotations

import contextlib
import os
import re
import select
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from folders import SUPPORT, TESTS

import torchfedrpc

_LAUNCHER_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "GROUP_WORLD_SIZE")
_LAUNCHER_PREFIXES = ("TORCHELASTIC", "GROUP_", "ROLE_", "SLURM_", "OMPI_", "PMI")


def environment() -> dict[str, str]:
    """The environment of this process without the variables of a launcher, and with the modules of tests."""
    kept = {name: value for name, value in os.environ.items() if name not in _LAUNCHER_VARIABLES}
    kept = {name: value for name, value in kept.items() if not name.startswith(_LAUNCHER_PREFIXES)}
    path = os.pathsep.join([str(SUPPORT), str(TESTS), str(TESTS / "system"), *filter(None, [kept.get("PYTHONPATH")])])
    return {**kept, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}


class Process:
    """A process with all that it has printed so far, on both streams; a thread reads it. The block's end kills it.

    Args:
        command: The program and its arguments.
        folder: Its working directory.
        variables: Environment variables, beside those of `environment`.
        takes_lines: Whether its standard input is a pipe.

    Attributes:
        process: The process.
        lines: The lines that it has printed.
    """

    def __init__(
        self,
        *command: str,
        folder: Path = SUPPORT,
        variables: Mapping[str, str] | None = None,
        takes_lines: bool = False,
    ) -> None:
        self.process = subprocess.Popen(
            command,
            env=environment() | dict(variables or {}),
            cwd=folder,
            stdin=subprocess.PIPE if takes_lines else subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,  # Ctrl-C is for the process that starts it
        )
        self.lines: list[str] = []
        self._num_taken = 0
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

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def next_line(self, pattern: str = "", timeout_s: float = 60.0) -> str:
        """Wait for the next line that a regular expression matches, after the line that this returned last.

        Raises:
            AssertionError: If it ends, or the time is over, before it is printed.
        """

        def found() -> list[int]:
            numbers = range(self._num_taken, len(self.lines))
            return [number for number in numbers if re.search(pattern, self.lines[number])]

        with contextlib.suppress(TimeoutError):
            self._until(lambda: bool(found()), timeout_s)
        assert found(), f"no line {pattern!r}:\n{self.output}"
        self._num_taken = found()[0] + 1
        return self.lines[self._num_taken - 1]

    def tell(self, line: str) -> None:
        """Write a line to its standard input."""
        assert self.process.stdin is not None
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()

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
        """Kill the process and its descendants, if it has not ended."""
        for pid in [*descendants_of(self.pid), self.pid] if self.process.poll() is None else []:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait()
        self._reader.join()
        for stream in filter(None, (self.process.stdin, self.process.stdout)):
            stream.close()

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


def ends_within(pid: int, timeout_s: float) -> bool:
    """Whether a process, which need not be a child, ends in time."""
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    try:
        return bool(select.select([descriptor], [], [], timeout_s)[0])
    finally:
        os.close(descriptor)


def descendants_of(pid: int) -> list[int]:
    """The children of a process that have not ended, and theirs, and so on."""
    return [one for child in children_of(pid) for one in (child, *descendants_of(child))]


def serving_for(pid: int) -> list[int]:
    """The workers of a driver, or of a worker that listens: the children of its fork server."""
    return [worker for server in children_of(pid) for worker in children_of(server)]


def wait_for_end(pids: list[int], timeout_s: float) -> float:
    """Wait until processes have ended: the seconds that it took."""
    began = time.monotonic()
    while alive := [pid for pid in pids if is_alive(pid)]:
        if time.monotonic() - began > timeout_s:
            raise AssertionError(f"still running after {timeout_s} s: {alive}")
        time.sleep(0.02)
    return time.monotonic() - began


# Processes that use the library's modules without torch, which takes seconds to import.

PREAMBLE = f"""
import sys, types
sys.modules["torchfedrpc"] = types.ModuleType("torchfedrpc")  # in place of the one that imports everything
sys.modules["torchfedrpc"].__path__ = [{str(Path(torchfedrpc.__file__).parent)!r}]
"""


@contextlib.contextmanager
def killed_unless_done(process: subprocess.Popen[Any], timeout_s: float = 60.0) -> Iterator[None]:
    """Kill a process unless the block is left in time: reading its output then comes to an end."""
    timer = threading.Timer(timeout_s, process.kill)
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        timer.join()


class LightProcess:
    """A Python process that runs some lines; an open pipe is its standard input, and its output is read here.

    Args:
        code: what it runs; ``sys`` is imported.
        arguments: its ``sys.argv[1:]``.
        pass_fds: descriptors that it has too, under the same numbers.
        prefix: a command that runs it, such as one that enters a network namespace.
    """

    def __init__(
        self, code: str, *arguments: object, pass_fds: Sequence[int] = (), prefix: Sequence[str] = ()
    ) -> None:
        self.popen = subprocess.Popen(
            [*prefix, sys.executable, "-c", PREAMBLE + textwrap.dedent(code), *map(str, arguments)],
            pass_fds=pass_fds,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.pid = self.popen.pid

    def line(self) -> str:
        """The next line of its output, or what there is of one at its end."""
        assert self.popen.stdout is not None
        with killed_unless_done(self.popen):
            return self.popen.stdout.readline().rstrip("\n")

    def tell(self, line: str) -> None:
        """Write a line to its input."""
        assert self.popen.stdin is not None
        self.popen.stdin.write(line + "\n")
        self.popen.stdin.flush()

    def ending(self, timeout_s: float = 10.0) -> int:
        """Wait for its end; its exit status, or minus the signal that ended it."""
        return self.popen.wait(timeout_s)

    def close(self) -> None:
        """End it, whatever it does."""
        self.popen.kill()
        with self.popen:
            pass
