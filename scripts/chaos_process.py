"""Processes beside that of chaos, and what they print."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from chaos_report import HangError

from torchfedrpc.rpc.processes import ends_within

SCRIPTS = Path(__file__).parent
_MARK = "chaos "
_READ_BYTES = 65536


def tell(**values: Any) -> None:
    """Print something for `Command.told` of the process that has started this one."""
    sys.stdout.write(f"{_MARK}{json.dumps(values)}\n")
    sys.stdout.flush()


class Command:
    """A process that finds the modules of chaos, with all that it has printed so far.

    Args:
        command: what it runs.

    Attributes:
        lines: what it has printed.
    """

    def __init__(self, *command: str) -> None:
        self.lines: list[str] = []
        self._told: deque[dict[str, Any]] = deque()
        self._unfinished = b""
        self._is_over = False
        self._changed = asyncio.Event()
        self._process = subprocess.Popen(
            command,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            cwd=SCRIPTS,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C is for us
        )
        assert self._process.stdout is not None
        self._output = self._process.stdout
        os.set_blocking(self._output.fileno(), False)
        asyncio.get_running_loop().add_reader(self._output, self._read)

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._process.pid

    @property
    def output(self) -> str:
        """What it has printed."""
        with suppress(BlockingIOError):  # where the event loop hangs, it does not read
            while not self._is_over:
                self._read()
        return "\n".join(self.lines)

    async def told(self, timeout_s: float) -> dict[str, Any] | None:
        """The next that it tells by `tell`; None where it, and all that print for it, have ended.

        Raises:
            HangError: nothing comes for so long.
        """
        await self._until(lambda: self._told, "it tells nothing", timeout_s)
        return self._told.popleft() if self._told else None

    async def line(self, part: str, count: int, timeout_s: float) -> str:
        """Wait for so many lines with that in them; the last of these.

        Raises:
            HangError: they do not come.
            RuntimeError: it has ended without them.
        """
        await self._until(lambda: len(self._with(part)) >= count, f"it does not print {part!r}", timeout_s)
        if len(self._with(part)) < count:
            raise RuntimeError(f"it ended and has not printed {part!r}, but:\n{self.output}")
        return self._with(part)[count - 1]

    def signal(self, number: signal.Signals) -> None:
        """Send it a signal, if it is there."""
        self._process.send_signal(number)

    async def ended(self, timeout_s: float) -> int:
        """Wait for its end; its exit status.

        Raises:
            HangError: it does not end.
        """
        if not await ends_within(self._process, timeout_s):
            raise HangError(f"process {self.pid} does not end", timeout_s)
        return self._process.wait()

    def close(self) -> None:
        """Kill it, if it is there."""
        self._process.kill()
        self._process.wait()
        self._stop_reading()
        self._output.close()

    async def _until(self, met: Callable[[], object], what: str, timeout_s: float) -> None:
        try:
            async with asyncio.timeout(timeout_s):
                while not met() and not self._is_over:
                    self._changed.clear()
                    await self._changed.wait()
        except TimeoutError:
            raise HangError(what, timeout_s) from None

    def _with(self, part: str) -> list[str]:
        return [line for line in self.lines if part in line]

    def _read(self) -> None:
        data = os.read(self._output.fileno(), _READ_BYTES)
        *lines, self._unfinished = (self._unfinished + data).split(b"\n")
        for line in lines:
            text = line.decode(errors="replace")
            if text.startswith(_MARK):
                self._told.append(json.loads(text.removeprefix(_MARK)))
            else:
                self.lines.append(text)
        if not data:
            self._stop_reading()
        self._changed.set()

    def _stop_reading(self) -> None:
        if not self._is_over:
            asyncio.get_running_loop().remove_reader(self._output)
        self._is_over = True


@contextmanager
def running(*command: str) -> Iterator[Command]:
    """A process for so long; where that ends by an error, what the process has printed is shown."""
    process = Command(*command)
    try:
        yield process
    except Exception:
        print(f"process {process.pid} has printed:\n{process.output}", file=sys.stderr)
        raise
    finally:
        process.close()


def children_of(pid: int) -> list[int]:
    """The children of a process."""
    with suppress(OSError):
        tasks = list(Path(f"/proc/{pid}/task").iterdir())
        return [int(child) for task in tasks for child in (task / "children").read_text().split()]
    return []


def command_of(pid: int) -> str:
    """The command line of a process; empty where it has ended."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_text(errors="replace").replace("\0", " ")
    except OSError:
        return ""


def state_of(pid: int) -> str:
    """The letter that ``ps`` shows for a process; X where it is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return "X"
