"""The table of chaos: a row for each fault, printed as it comes about."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field

HANG_S = 90.0  # for a round; a loss takes some seconds, a multiple of it on a machine with too much to do


class HangError(Exception):
    """Something does not end."""

    def __init__(self, what: str, seconds: float = HANG_S) -> None:
        super().__init__(f"{what} for {seconds:.0f} s")


@dataclass(frozen=True)
class Felt:
    """How a fault was felt.

    Attributes:
        seconds: one for each column of its section; None where there was nothing to wait for.
        count: of what its section counts.
    """

    seconds: tuple[float | None, ...]
    count: int


@dataclass
class Section:
    """Rows that have the same columns.

    Attributes:
        title: what is struck.
        columns: the names of what is measured, in seconds.
        counted: the name of what is counted.
        legend: what these mean.
        rows: those so far.
    """

    title: str
    columns: tuple[str, ...]
    counted: str
    legend: str
    rows: list[Felt | None] = field(default_factory=list)

    def head(self) -> str:
        """What the columns are called."""
        names = "".join(f"{name:>8}" for name in self.columns)
        return f"{'':>3}  {self.title:37}{'struck':24}{names}  {self.counted:>5}  bits equal"

    def row(self, number: str, fault: str, struck: str, felt: Felt | None, verdict: str) -> str:
        """A row."""
        seconds = felt.seconds if felt is not None else (None,) * len(self.columns)
        numbers = "".join(f"{'-' if value is None else format(value, '.2f'):>8}" for value in seconds)
        count = felt.count if felt is not None else "-"
        return f"{number:>3}  {fault:37}{struck:24}{numbers}  {count:>5}  {verdict}"

    def summary(self) -> str:
        """What the rows come to."""
        parts = [f"{len(self.rows)} faults"]
        for position, name in enumerate(self.columns):
            seconds = [row.seconds[position] for row in self.rows if row is not None]
            if values := [value for value in seconds if value is not None]:
                parts.append(f"{name} {statistics.median(values):.2f} s, at most {max(values):.2f} s")
        return f"{self.title + ':':30}{'; '.join(parts)}"


class Report:
    """The table, and what is wrong with it.

    Attributes:
        num_hangs: what did not end.
        num_failures: what ended with an error.
        num_differences: faults and runs with other bits than those of an undisturbed run.
        leftovers: what was left behind, each as a line.
    """

    def __init__(self) -> None:
        self.num_hangs = 0
        self.num_failures = 0
        self.num_differences = 0
        self.leftovers: list[str] = []
        self._sections: list[Section] = []
        self._num_rows = 0

    @property
    def num_problems(self) -> int:
        """How much is to be mended."""
        return self.num_hangs + self.num_failures + self.num_differences + len(self.leftovers)

    def begin(self, section: Section) -> None:
        """The rows to come are of this section."""
        if section.legend not in [before.legend for before in self._sections]:
            print(f"\n{section.legend}")
        self._sections.append(section)
        print(f"\n{section.head()}", flush=True)

    def fault(self, name: str, struck: Sequence[str], felt: Felt, different: Sequence[str]) -> None:
        """One fault more, and what of the results that followed, if anything, has other bits than it should have."""
        self.num_differences += bool(different)
        self._add(name, struck, felt, _verdict(different))

    def failed_fault(self, name: str, struck: Sequence[str], error: Exception) -> None:
        """One fault more, of which a hang or an error came."""
        self._add(name, struck, None, self._problem(error))

    def differing(self, what: str, different: Sequence[str]) -> None:
        """Something that no single fault accounts for, and what of it, if anything, has other bits."""
        if different:
            self.num_differences += 1
            self._print("", what, [], None, _verdict(different))

    def failed(self, what: str, error: Exception) -> None:
        """Something hangs or fails for which no single fault accounts."""
        self._print("", what, [], None, self._problem(error))

    def left_over(self, things: Sequence[str]) -> None:
        """A run has ended, and these are still there."""
        self.leftovers += things
        for thing in things:
            print(f"     left over: {thing}", flush=True)

    def summary(self) -> None:
        """Say what it comes to."""
        print(
            f"\n{self._num_rows} faults, {self.num_hangs} hangs, {self.num_failures} errors, "
            f"{self.num_differences} differences, {len(self.leftovers)} leftovers"
        )
        for section in self._sections:
            if section.rows:
                print(section.summary())

    def _add(self, name: str, struck: Sequence[str], felt: Felt | None, verdict: str) -> None:
        self._num_rows += 1
        self._sections[-1].rows.append(felt)
        self._print(str(self._num_rows), name, struck, felt, verdict)

    def _print(self, number: str, name: str, struck: Sequence[str], felt: Felt | None, verdict: str) -> None:
        print(self._sections[-1].row(number, name, ",".join(struck), felt, verdict), flush=True)

    def _problem(self, error: Exception) -> str:
        is_hang = isinstance(error, HangError)
        self.num_hangs += is_hang
        self.num_failures += not is_hang
        return f"HANG: {error}" if is_hang else f"ERROR: {error!r}"


def _verdict(different: Sequence[str]) -> str:
    return f"NO: {', '.join(different)}" if different else "yes"
