"""Measures a row: the results are compared first, then batches of all contenders alternate."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import math
import os
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from protocol import Measured
from table_rows import Entry, Line, Program, Row

FOLDER = Path(__file__).parent
NUM_CHECKED = 3  # repetitions whose results are compared, and which warm a contender up
NUM_ROUNDS = 9  # batches of each contender, at most
BATCH_S = 0.4  # of a batch, where a repetition takes less
ROW_S = 60.0  # of timing, after which a row begins no further round
TOTAL_S = 3600.0  # of all rows; those that are left share the seconds that are left
ANSWER_S = 240.0
END_S = 15.0
_LONGEST_LINE_BYTES = 1 << 24


# A contender's process.


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
    """

    def __init__(self, program: Program, workloads: Sequence[str]) -> None:
        self.versions: dict[str, str] = {}
        self._program = program
        self._workloads = workloads
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
            await asyncio.wait_for(process.wait(), END_S if self._unable is None else 2.0)
        with contextlib.suppress(ProcessLookupError, PermissionError):  # no process is left
            os.killpg(process.pid, signal.SIGKILL)
        await process.wait()

    async def _start(self) -> None:
        python = Path(sys.executable)
        if self._program.peer is not None:
            python = FOLDER / ".peers" / self._program.peer / "bin" / "python"
            if not python.exists():
                raise Unable("not installed (scripts/bench/setup-peers)", expected=True)
        self._process = await asyncio.create_subprocess_exec(
            python,
            FOLDER / "contenders" / f"{self._program.file}.py",
            ",".join(self._workloads),
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
            Unable: If the contender cannot do the work, ends, or gives no answer in time.
        """
        assert self._process is not None
        assert self._process.stdout is not None
        try:
            async with asyncio.timeout(ANSWER_S):
                while line := await self._process.stdout.readline():
                    with contextlib.suppress(ValueError):  # an import may print something
                        answer = json.loads(line)
                        if isinstance(answer, dict):
                            break
                else:
                    status = await self._process.wait()
                    raise Unable(f"ended with status {status} while {what}: {self._last_words()}")
        except TimeoutError:
            raise Unable(f"no answer within {ANSWER_S:g} s while {what}: {self._last_words()}") from None
        if "failed" in answer:
            raise Unable(f"failed while {what}: {answer['failed']}")
        if "cannot" in answer:
            raise Unable(answer["cannot"], expected=self._program.peer is not None)
        return answer

    def _last_words(self) -> str:
        """The last line that it printed."""
        self._log.seek(0)
        lines = self._log.read().decode(errors="replace").split("\n")
        return next((line.strip() for line in reversed(lines) if line.strip()), "it printed nothing")


class _Contenders:
    """The processes of the rows of one setting; peers have one for each row."""

    def __init__(self, rows: Sequence[Row]) -> None:
        self._running: dict[tuple[Program, str], Contender] = {}
        self._workloads: dict[tuple[Program, str], list[str]] = {}
        for row in rows:
            for entry in row.entries:
                workloads = self._workloads.setdefault(_key(entry, row), [])
                if entry.workload not in workloads:
                    workloads.append(entry.workload)

    async def of(self, row: Row) -> dict[Entry, Contender]:
        """Those of a row, prepared."""
        new = {}
        for key in (_key(entry, row) for entry in row.entries):
            if key not in self._running:
                new[key] = self._running[key] = Contender(key[0], self._workloads[key])
        await asyncio.gather(*(contender.prepare() for contender in new.values()))
        return {entry: self._running[_key(entry, row)] for entry in row.entries}

    async def end(self, row: Row | None = None) -> None:
        """End the processes of a row that no other row uses, or all."""
        own = {_key(entry, row) for entry in row.entries if entry.program.peer} if row else set(self._running)
        ended = [self._running.pop(key) for key in own if key in self._running]
        await asyncio.gather(*(contender.end() for contender in ended))


def _key(entry: Entry, row: Row) -> tuple[Program, str]:
    return entry.program, row.name if entry.program.peer else entry.apart


# Results.


@dataclass(frozen=True)
class Spread:
    """A number that was taken several times.

    Attributes:
        median: Of all.
        least: Of all.
        most: Of all.
    """

    median: float
    least: float
    most: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """That of these."""
        return cls(statistics.median(values), min(values), max(values))


@dataclass
class RowResult:
    """The results of a row.

    Attributes:
        row: The row.
        batches: Label -> the results of its batches, one for each round.
        unable: Label -> the reason why it gives no numbers.
        versions: Program's label -> library -> version.
    """

    row: Row
    batches: dict[str, list[Measured]] = field(default_factory=dict)
    unable: dict[str, Unable] = field(default_factory=dict)
    versions: dict[str, dict[str, str]] = field(default_factory=dict)

    def median(self, line: Line, label: str) -> float:
        """The median of a contender's number over all batches."""
        return statistics.median(batch.median(line.quantity) for batch in self.batches[label])

    def mean(self, line: Line, label: str) -> float:
        """The mean of a contender's number over all batches."""
        return statistics.fmean(batch.mean(line.quantity) for batch in self.batches[label])

    def compared(self, line: Line) -> Spread:
        """The numbers of a line: each round's ratio or difference of medians, or its value."""
        ours = [batch.median(line.quantity) for batch in self.batches[self.row.entries[0].label]]
        if line.against is None:
            return Spread.of(ours)
        theirs = [batch.median(line.quantity) for batch in self.batches[line.against]]
        return Spread.of([_compared(line, *pair) for pair in zip(ours, theirs, strict=True)])

    def compared_means(self, line: Line) -> float:
        """The same of the means over all batches."""
        own = self.mean(line, self.row.entries[0].label)
        return own if line.against is None else _compared(line, own, self.mean(line, line.against))

    def is_met(self, line: Line) -> bool | None:
        """Whether a line's target is reached; None where there is none."""
        if line.target is None:
            return None
        value = self.compared_means(line) if line.is_of_mean else self.compared(line).median
        return value >= line.target if line.kind == "speed" else value <= line.target


def _compared(line: Line, own: float, other: float) -> float:
    if line.kind == "difference":
        return own - other
    return other / own if line.kind == "speed" else own / other


# Measuring.


def measured(rows: Sequence[Row]) -> Iterator[RowResult]:
    """Measure rows, one after another."""
    deadline, num_left = time.perf_counter() + TOTAL_S, len(rows)
    with asyncio.Runner() as runner:
        for _, group in itertools.groupby(rows, key=lambda row: row.setting):
            together = list(group)
            contenders = _Contenders(together)
            try:
                for row in together:
                    row_s = min(ROW_S, (deadline - time.perf_counter()) / num_left)
                    yield runner.run(_measure(row, contenders, row_s))
                    num_left -= 1
            finally:
                runner.run(contenders.end())


def smoked(rows: Sequence[Row]) -> Iterator[RowResult]:
    """Let all contenders of each row do its work once, and compare their results; nothing is timed."""
    groups = [list(group) for _, group in itertools.groupby(rows, key=lambda row: row.setting)]
    at_once = asyncio.Semaphore(os.cpu_count() or 1)

    async def smoke(group: Sequence[Row]) -> list[RowResult]:
        async with at_once:
            contenders = _Contenders(group)
            try:
                return [await _measure(row, contenders, None) for row in group]
            finally:
                await contenders.end()

    async def smoke_all() -> list[list[RowResult]]:
        return await asyncio.gather(*map(smoke, groups))

    for results in asyncio.run(smoke_all()):
        yield from results


async def _measure(row: Row, contenders: _Contenders, row_s: float | None) -> RowResult:
    """Measure a row in so many seconds of timing; without any, only compare the results."""
    result = RowResult(row)
    try:
        running = await contenders.of(row)
        for entry, contender in running.items():
            if contender.versions:
                result.versions.setdefault(entry.program.label, {}).update(contender.versions)
        counts = await _check(row, running, 1 if row_s is None else NUM_CHECKED, result)
        if row_s is not None:
            ends = time.perf_counter() + row_s
            is_alone = row.count is not None and len(row.entries) == 1
            for number in range(1 if is_alone else NUM_ROUNDS):
                if number and time.perf_counter() > ends:
                    break
                await _one_round(number, running, counts, result)
    finally:
        await contenders.end(row)
    return result


async def _check(row: Row, running: dict[Entry, Contender], num_checked: int, result: RowResult) -> dict[Entry, int]:
    """Compare the results of all contenders; returns the number of repetitions in a batch of each."""
    counts: dict[Entry, int] = {}
    checks: dict[Entry, str | list[float]] = {}
    for entry, contender in running.items():
        try:
            checked = await contender.ask(entry.workload, num_checked)
        except Unable as error:
            result.unable[entry.label] = error
            continue
        checks[entry] = checked.check
        counts[entry] = row.count or max(1, min(1000, round(BATCH_S / min(checked.seconds))))
    # The result that counts is the second entry's where there is one: a loop or a library that is simpler than ours.
    reference = next((checks[entry] for entry in row.entries[1:] if entry in checks), None)
    for entry, check in checks.items():
        if reference is not None and not _agree(check, reference, row.tolerance):
            result.unable[entry.label] = Unable("its result is another one, so it was not timed")
            del counts[entry]
    return counts


def _agree(one: str | list[float], other: str | list[float], tolerance: float) -> bool:
    if isinstance(one, str) or isinstance(other, str):
        return one == other
    return len(one) == len(other) and all(
        math.isclose(number, another, rel_tol=tolerance, abs_tol=tolerance)
        for number, another in zip(one, other, strict=True)
    )


async def _one_round(
    number: int, running: dict[Entry, Contender], counts: dict[Entry, int], result: RowResult
) -> None:
    """Time a batch of each contender, from first to last or from last to first; one that fails is left out."""
    entries = list(counts) if number % 2 == 0 else list(reversed(counts))
    for entry in entries:
        try:
            batch = await running[entry].ask(entry.workload, counts[entry])
        except Unable as error:
            result.unable[entry.label] = error
            result.batches.pop(entry.label, None)
            del counts[entry]
        else:
            result.batches.setdefault(entry.label, []).append(batch)
