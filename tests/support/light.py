"""Processes for tests that use the library's modules without torch, which takes seconds to import."""

from __future__ import annotations

import contextlib
import os
import select
import subprocess
import sys
import textwrap
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from processes import state_of as state_of

import torchfedrpc

_PREAMBLE = f"""
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
            [*prefix, sys.executable, "-c", _PREAMBLE + textwrap.dedent(code), *map(str, arguments)],
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
