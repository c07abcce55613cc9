"""Workers that listen or join, as processes of a test, which ends them with itself."""

from __future__ import annotations

import contextlib
import secrets
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

from folders import SUPPORT
from torchrun import environment


def make_token(folder: Path) -> str:
    """A token's file."""
    path = folder / "token"
    path.write_text(secrets.token_hex(32))
    path.chmod(0o600)
    return str(path)


PROGRAM = (sys.executable, "-m", "torchfedrpc.worker_cli")


class WorkerCommand:
    """``torchfedrpc-worker``, with all that it has printed so far.

    Args:
        arguments: of the command.
        prefix: a command that runs it, such as one that enters a network namespace.
        program: what it is called by.
    """

    def __init__(self, *arguments: str, prefix: Sequence[str] = (), program: Sequence[str] = PROGRAM) -> None:
        self.process = subprocess.Popen(
            [*prefix, *program, *arguments],
            env=environment(),
            cwd=SUPPORT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        self.lines: list[str] = []
        self._changed = threading.Condition()
        self._is_over = False
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    @property
    def output(self) -> str:
        """What it has printed."""
        return "\n".join(self.lines)

    def line(self, part: str, count: int = 1, timeout_s: float = 60.0) -> str:
        """Wait for so many lines with that in them; the last of these."""
        with self._changed:
            assert self._changed.wait_for(lambda: self._is_over or len(self._found(part)) >= count, timeout_s), (
                self.output
            )
            found = self._found(part)
        assert len(found) >= count, self.output
        return found[count - 1]

    def signal(self, number: signal.Signals) -> None:
        """Send it a signal."""
        self.process.send_signal(number)

    def ended(self, timeout_s: float = 30.0) -> int:
        """Wait for its end; its exit status."""
        status = self.process.wait(timeout_s)
        self._reader.join(timeout_s)
        return status

    def close(self) -> None:
        """Kill it, if it is there."""
        self.process.kill()
        self.process.wait()
        self._reader.join()
        assert self.process.stdout is not None
        self.process.stdout.close()

    def _found(self, part: str) -> list[str]:
        return [line for line in self.lines if part in line]

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            with self._changed:
                self.lines.append(line.rstrip())
                self._changed.notify_all()
        with self._changed:
            self._is_over = True
            self._changed.notify_all()


@contextlib.contextmanager
def listening(
    token: str, address: str = "127.0.0.1:0", prefix: Sequence[str] = (), program: Sequence[str] = PROGRAM
) -> Iterator[tuple[WorkerCommand, str]]:
    """A worker that listens, and where."""
    worker = WorkerCommand("--listen", address, "--token-file", token, prefix=prefix, program=program)
    try:
        yield worker, worker.line("listening on ").removeprefix("listening on ")
    finally:
        worker.close()


@contextlib.contextmanager
def joining(address: str, token: str, prefix: Sequence[str] = ()) -> Iterator[WorkerCommand]:
    """A worker that joins the run of a driver."""
    worker = WorkerCommand("--join", address, "--token-file", token, prefix=prefix)
    try:
        yield worker
    finally:
        worker.close()
