"""The table of chaos: a row for each fault, printed as it ends, and the judgement of all."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field

HANG_S = 180.0  # for a round; a loss takes some seconds, and twenty times as long on a machine with too much to do


class HangError(Exception):
    """Something does not end."""

    def __init__(self, what: str, seconds: float = HANG_S) -> None:
        super().__init__(f"{what} for {seconds:.0f} s")


@dataclass(frozen=True)
class Observed:
    """The effects of a fault.

    Attributes:
        seconds: One number for each column of the section; None if there was nothing to wait for.
        count: The number that the section counts.
        under_way: The activities of the run at each strike.
        different: The parts of the results that have other bits than they should have.
        missed: The expectations that were not met.
    """

    seconds: tuple[float | None, ...]
    count: int
    under_way: Sequence[str] = ()
    different: Sequence[str] = ()
    missed: Sequence[str] = ()

    @property
    def verdict(self) -> str:
        """The last column."""
        bits = f"NO: {', '.join(self.different)}" if self.different else "yes"
        return "; ".join([bits, *(f"EXPECTED {one}" for one in self.missed)])


@dataclass
class Section:
    """Rows that have the same columns.

    Attributes:
        title: What is struck.
        columns: The names of the times that are measured, in seconds.
        counted: The name of the number that is counted.
        legend: The meaning of the columns.
        rows: The rows so far.
    """

    title: str
    columns: tuple[str, ...]
    counted: str
    legend: str
    rows: list[Observed | None] = field(default_factory=list)

    def head(self) -> str:
        """The names of the columns."""
        names = "".join(f"{name:>8}" for name in self.columns)
        return f"{'':>3}  {self.title:37}{'struck':24}{names}  {self.counted:>5}  {'under way':44}  bits equal"

    def row(self, number: str, fault: str, struck: Sequence[str], observed: Observed | None, verdict: str) -> str:
        """A row."""
        seconds = observed.seconds if observed is not None else (None,) * len(self.columns)
        numbers = "".join(f"{'-' if value is None else format(value, '.2f'):>8}" for value in seconds)
        count = observed.count if observed is not None else "-"
        under_way = " | ".join(observed.under_way) if observed is not None else ""
        return f"{number:>3}  {fault:37}{','.join(struck):24}{numbers}  {count:>5}  {under_way:44}  {verdict}"

    def summary(self) -> str:
        """The medians and maxima of the rows."""
        parts = [f"{len(self.rows)} faults"]
        for position, name in enumerate(self.columns):
            seconds = [row.seconds[position] for row in self.rows if row is not None]
            if values := [value for value in seconds if value is not None]:
                parts.append(f"{name} {statistics.median(values):.2f} s, at most {max(values):.2f} s")
        return f"{self.title + ':':30}{'; '.join(parts)}"


class Report:
    """The table, and its failures.

    Attributes:
        num_hangs: Faults and runs that did not end.
        num_errors: Faults and runs that ended with an error.
        num_different: Faults and runs with other bits than those of an undisturbed run.
        num_missed: Faults whose expectations were not met.
        leftovers: Lines that name what was left behind.
    """

    def __init__(self) -> None:
        self.num_hangs = 0
        self.num_errors = 0
        self.num_different = 0
        self.num_missed = 0
        self.leftovers: list[str] = []
        self._sections: list[Section] = []
        self._num_rows = 0

    @property
    def num_problems(self) -> int:
        """How many failures there are; chaos has passed if there are none."""
        return self.num_hangs + self.num_errors + self.num_different + self.num_missed + len(self.leftovers)

    def begin(self, section: Section) -> None:
        """Begin a section."""
        if section.legend not in [before.legend for before in self._sections]:
            print(f"\n{section.legend}")
        self._sections.append(section)
        print(f"\n{section.head()}", flush=True)

    def fault(self, name: str, struck: Sequence[str], observed: Observed) -> None:
        """Add a fault and its effects."""
        self.num_different += bool(observed.different)
        self.num_missed += bool(observed.missed)
        self._add(name, struck, observed, observed.verdict)

    def failed_fault(self, name: str, struck: Sequence[str], error: Exception) -> None:
        """Add a fault that led to a hang or an error."""
        self._add(name, struck, None, self._problem(error))

    def differing(self, what: str, different: Sequence[str]) -> None:
        """Add differing bits, if there are any, that no single fault accounts for."""
        if different:
            self.num_different += 1
            self._print("", what, [], None, f"NO: {', '.join(different)}")

    def failed(self, what: str, error: Exception) -> None:
        """Add a hang or an error that no single fault accounts for."""
        self._print("", what, [], None, self._problem(error))

    def left_over(self, things: Sequence[str]) -> None:
        """Add things that are there after the end of a run."""
        self.leftovers += things
        for thing in things:
            print(f"     left over: {thing}", flush=True)

    def summary(self) -> None:
        """Print the totals."""
        print(
            f"\n{self._num_rows} faults, {self.num_hangs} hangs, {self.num_errors} errors, {self.num_different} "
            f"differences, {self.num_missed} missed expectations, {len(self.leftovers)} leftovers"
        )
        for section in self._sections:
            if section.rows:
                print(section.summary())

    def _add(self, name: str, struck: Sequence[str], observed: Observed | None, verdict: str) -> None:
        self._num_rows += 1
        self._sections[-1].rows.append(observed)
        self._print(str(self._num_rows), name, struck, observed, verdict)

    def _print(self, number: str, name: str, struck: Sequence[str], observed: Observed | None, verdict: str) -> None:
        print(self._sections[-1].row(number, name, struck, observed, verdict), flush=True)

    def _problem(self, error: Exception) -> str:
        is_hang = isinstance(error, HangError)
        self.num_hangs += is_hang
        self.num_errors += not is_hang
        return f"HANG: {error}" if is_hang else f"ERROR: {error!r}"
