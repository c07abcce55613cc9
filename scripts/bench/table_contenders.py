"""A contender's process: started, asked for measurements, and ended with all that it started."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import statistics
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from table_rows import UNEVENNESS, Program

FOLDER = Path(__file__).parent
_END_TIMEOUT_S = 15.0
_LONGEST_LINE_BYTES = 1 << 24


@dataclass(frozen=True)
class Measured:
    """The answer of a contender, see ``contenders/protocol.py``."""

    seconds: list[float]
    check: str | list[float]
    extra: dict[str, float]

    def median(self, quantity: str) -> float:
        """The median of the seconds, or a number by its name."""
        if quantity == UNEVENNESS:
            return statistics.fmean(self.seconds) / statistics.median(self.seconds)
        return statistics.median(self.seconds) if quantity == "seconds" else self.extra[quantity]

    def mean(self, quantity: str) -> float:
        """The mean of the seconds, or the same number by its name."""
        return statistics.fmean(self.seconds) if quantity == "seconds" else self.median(quantity)


class Unable(Exception):
    """A contender gives no numbers; the message says why.

    Attributes:
        expected: Whether it is no failure, as for a peer that is not installed.
    """

    def __init__(self, why: str, *, expected: bool = False) -> None:
        super().__init__(why)
        self.expected = expected


class Contender:
    """One process of a program.

    Args:
        program: The program.
        workloads: The workloads that it prepares.
        options: The options that it is started with.
        timeout_s: The timeout of its preparation, and of each answer.
    """

    def __init__(
        self, program: Program, workloads: Sequence[str], *, options: Sequence[str], timeout_s: float
    ) -> None:
        self.versions: dict[str, str] = {}
        self._program = program
        self._workloads = workloads
        self._options = options
        self._timeout_s = timeout_s
        self._unable: Unable | None = None
        self._process: asyncio.subprocess.Process | None = None
        self._log: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115  (it is closed with this object)

    async def prepare(self) -> None:
        """Start it and wait until it is ready; if it cannot be, `ask` raises the reason."""
        try:
            await self._start()
            self.versions = (await self._answer("preparing"))["versions"]
        except Unable as error:
            self._unable = error
            await self.end()

    async def ask(self, workload: str, count: int) -> Measured:
        """Have it do a workload so many times.

        Raises:
            Unable: If it cannot, has failed, or gives no answer in time.
        """
        if self._unable is not None:
            raise self._unable
        assert self._process is not None
        assert self._process.stdin is not None
        self._process.stdin.write(f"{workload} {count}\n".encode())
        try:
            return Measured(**await self._answer(f"{count} x {workload}"))
        except Unable as error:
            if self._process.returncode is not None or not error.expected:
                self._unable = error
                await self.end()
            raise

    async def end(self) -> None:
        """End it and its process group, by force if it does not end by itself."""
        process, self._process = self._process, None
        if process is None:
            return
        assert process.stdin is not None
        process.stdin.close()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(process.wait(), _END_TIMEOUT_S if self._unable is None else 2.0)
        with contextlib.suppress(ProcessLookupError, PermissionError):  # no process is left
            os.killpg(process.pid, signal.SIGKILL)
        await process.wait()

    async def _start(self) -> None:
        python = Path(sys.executable)
        if self._program.peer is not None:
            python = FOLDER / ".peers" / self._program.peer / "bin" / "python"
            if not python.exists():
                raise Unable("not installed (scripts/bench/setup-peers)", expected=True)
        script = FOLDER / "contenders" / f"{self._program.file}.py"
        if not script.exists():
            raise Unable(f"there is no {script.name}", expected=True)
        arguments = [str(script), ",".join(self._workloads), *self._options]
        self._process = await asyncio.create_subprocess_exec(
            python,
            *arguments,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=self._log,
            env={**os.environ, "TORCH_CPP_LOG_LEVEL": "ERROR"},
            limit=_LONGEST_LINE_BYTES,
            start_new_session=True,
        )

    async def _answer(self, what: str) -> dict[str, Any]:
        """The next line that is an answer.

        Raises:
            Unable: If it says that it cannot, or ends, or gives no answer in time.
        """
        assert self._process is not None
        assert self._process.stdout is not None
        try:
            async with asyncio.timeout(self._timeout_s):
                while line := await self._process.stdout.readline():
                    with contextlib.suppress(ValueError):
                        answer = json.loads(line)
                        if isinstance(answer, dict):
                            break
                else:
                    status = await self._process.wait()
                    raise Unable(f"ended with status {status} while {what}: {self._last_words()}")
        except TimeoutError:
            raise Unable(f"no answer within {self._timeout_s:g} s while {what}: {self._last_words()}") from None
        if "cannot" in answer:
            raise Unable(answer["cannot"], expected=True)
        return answer

    def _last_words(self) -> str:
        """The last line that it printed."""
        self._log.seek(0)
        lines = self._log.read().decode(errors="replace").split("\n")
        return next((line.strip() for line in reversed(lines) if line.strip()), "it printed nothing")
