"""Workers that listen or join, as processes of a test, which ends them with itself."""

from __future__ import annotations

import contextlib
import secrets
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from processes import Process


def make_token(folder: Path) -> str:
    """A token's file."""
    path = folder / "token"
    path.write_text(secrets.token_hex(32))
    path.chmod(0o600)
    return str(path)


PROGRAM = (sys.executable, "-m", "torchfedrpc.worker_cli")


class WorkerCommand(Process):
    """``torchfedrpc-worker``.

    Args:
        arguments: of the command.
        prefix: a command that runs it, such as one that enters a network namespace.
        program: its name, or another command of the same.
        options: those of `Process`.
    """

    def __init__(
        self, *arguments: str, prefix: Sequence[str] = (), program: Sequence[str] = PROGRAM, **options: Any
    ) -> None:
        super().__init__(*prefix, *program, *arguments, **options)


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
def joining(address: str, token: str, prefix: Sequence[str] = (), **options: Any) -> Iterator[WorkerCommand]:
    """A worker that joins the run of a driver."""
    worker = WorkerCommand("--join", address, "--token-file", token, prefix=prefix, **options)
    try:
        yield worker
    finally:
        worker.close()
