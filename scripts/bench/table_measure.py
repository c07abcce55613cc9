"""Measures a row: the results are compared first, then batches of all contenders alternate."""

from __future__ import annotations

import asyncio
import itertools
import math
import os
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from table_contenders import Contender, Measured, Unable
from table_rows import Entry, Line, Program, Row


@dataclass(frozen=True)
class Effort:
    """How much time is spent.

    Attributes:
        options: The options of contenders.
        rounds: batches of each contender, at most.
        batch_s: seconds that a batch is to take, where a repetition takes less.
        row_s: seconds of timing after which a row begins no further round.
        total_s: seconds for all rows; rows that are left share the seconds that are left.
        check_count: repetitions whose results are compared.
        timeout_s: for each answer of a contender.
    """

    options: tuple[str, ...]
    rounds: int
    batch_s: float
    row_s: float
    total_s: float
    check_count: int
    timeout_s: float


FULL = Effort(options=(), rounds=9, batch_s=0.4, row_s=60.0, total_s=3600.0, check_count=2, timeout_s=240.0)
QUICK = Effort(options=("--quick",), rounds=5, batch_s=0.05, row_s=6.0, total_s=80.0, check_count=1, timeout_s=60.0)
SMOKE = Effort(
    options=("--quick", "--cold"), rounds=0, batch_s=0.0, row_s=0.0, total_s=0.0, check_count=1, timeout_s=120.0
)


@dataclass(frozen=True)
class Spread:
    """A number that was taken several times.

    Attributes:
        median: of all.
        least: of all.
        most: of all.
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
        row: which.
        batches: label -> what its batches gave, one for each round.
        unable: label -> why it gives no numbers.
        versions: program's label -> library -> version.
    """

    row: Row
    batches: dict[str, list[Measured]] = field(default_factory=dict)
    unable: dict[str, Unable] = field(default_factory=dict)
    versions: dict[str, dict[str, str]] = field(default_factory=dict)

    def own(self, line: Line) -> Spread:
        """The number of torchfedrpc."""
        return Spread.of([batch.median(line.quantity) for batch in self.batches[self.row.entries[0].label]])

    def other(self, line: Line) -> Spread:
        """The number that it is held against."""
        assert line.against is not None
        return Spread.of([batch.median(line.quantity) for batch in self.batches[line.against]])

    def mean(self, line: Line, label: str) -> float:
        """The mean of a contender's number over all batches."""
        return statistics.fmean(batch.mean(line.quantity) for batch in self.batches[label])

    def compared(self, line: Line) -> Spread:
        """What a line is about: each round's own ratio or difference, of medians."""
        ours = self.batches[self.row.entries[0].label]
        if line.against is None:
            return self.own(line)
        pairs = zip(ours, self.batches[line.against], strict=True)
        return Spread.of(
            [_compared(line, own.median(line.quantity), other.median(line.quantity)) for own, other in pairs]
        )

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


def measured(rows: Sequence[Row], effort: Effort) -> Iterator[RowResult]:
    """Measure rows, one after another."""
    deadline, num_left = time.perf_counter() + effort.total_s, len(rows)
    with asyncio.Runner() as runner:
        for _, group in itertools.groupby(rows, key=lambda row: row.setting):
            together = list(group)
            contenders = _Contenders(together, effort)
            try:
                for row in together:
                    yield runner.run(_measure(row, contenders, effort, deadline, num_left))
                    num_left -= 1
            finally:
                runner.run(contenders.end())


def smoked(rows: Sequence[Row]) -> Iterator[RowResult]:
    """Let all contenders of each row do its work once, and compare their results; nothing is timed."""
    groups = [list(group) for _, group in itertools.groupby(rows, key=lambda row: row.setting)]
    with asyncio.Runner() as runner:
        for results in runner.run(_smoke_all(groups)):
            yield from results


async def _smoke_all(groups: Sequence[Sequence[Row]]) -> list[list[RowResult]]:
    at_once = asyncio.Semaphore(os.cpu_count() or 1)

    async def smoke(group: Sequence[Row]) -> list[RowResult]:
        async with at_once:
            contenders = _Contenders(group, SMOKE)
            try:
                return [await _measure(row, contenders, SMOKE, 0.0, 1) for row in group]
            finally:
                await contenders.end()

    return await asyncio.gather(*map(smoke, groups))


class _Contenders:
    """The processes of the rows of one setting; peers have one for each row."""

    def __init__(self, rows: Sequence[Row], effort: Effort) -> None:
        self._effort = effort
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
        for entry in row.entries:
            key = _key(entry, row)
            if key not in self._running:
                new[key] = self._running[key] = Contender(
                    entry.program,
                    self._workloads[key],
                    options=self._effort.options,
                    timeout_s=self._effort.timeout_s,
                )
        await asyncio.gather(*(contender.prepare() for contender in new.values()))
        return {entry: self._running[_key(entry, row)] for entry in row.entries}

    async def end(self, row: Row | None = None) -> None:
        """End the processes of a row that no other row uses, or all."""
        own = {_key(entry, row) for entry in row.entries if entry.program.peer} if row else set(self._running)
        ended = [self._running.pop(key) for key in own if key in self._running]
        await asyncio.gather(*(contender.end() for contender in ended))


def _key(entry: Entry, row: Row) -> tuple[Program, str]:
    return entry.program, row.name if entry.program.peer else entry.apart


async def _measure(row: Row, contenders: _Contenders, effort: Effort, deadline: float, num_left: int) -> RowResult:
    """Measure a row in its share of the time until the deadline."""
    result = RowResult(row)
    try:
        running = await contenders.of(row)
        for entry, contender in running.items():
            if contender.versions:
                result.versions.setdefault(entry.program.label, {}).update(contender.versions)
        counts = await _check(row, running, effort, result)
        started = time.perf_counter()
        ends = started + min(effort.row_s, (deadline - started) / num_left)
        is_alone = row.count is not None and len(row.entries) == 1
        for number in range(min(effort.rounds, 1) if is_alone else effort.rounds):
            if number and time.perf_counter() > ends:
                break
            await _one_round(number, running, counts, result)
    finally:
        await contenders.end(row)
    return result


async def _check(row: Row, running: dict[Entry, Contender], effort: Effort, result: RowResult) -> dict[Entry, int]:
    """Compare the results of all contenders; returns the number of repetitions in a batch of each."""
    count = row.quick_count if "--quick" in effort.options and row.quick_count is not None else row.count
    counts: dict[Entry, int] = {}
    checks: dict[Entry, str | list[float]] = {}
    for entry, contender in running.items():
        try:
            checked = await contender.ask(entry.workload, effort.check_count)
        except Unable as error:
            result.unable[entry.label] = error
            continue
        checks[entry] = checked.check
        counts[entry] = count or max(1, min(1000, round(effort.batch_s / statistics.median(checked.seconds))))
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
