"""The table of chaos: a row for each fault, printed as it ends, and the judgement of all."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

HANG_S = 180.0  # for a round; a loss takes some seconds, and twenty times as long on a machine with too much to do


class HangError(Exception):
    """Something does not end."""

    def __init__(self, what: str, seconds: float = HANG_S) -> None:
        super().__init__(f"{what} for {seconds:.0f} s")


@dataclass(frozen=True)
class Observed:
    """The effects of a fault.

    Attributes:
        noticed_s: Seconds until the fault is noticed.
        back_s: Seconds from the last strike until the run can go on.
        results_s: Seconds from the last strike until the struck round has all of its results.
        num_lost: Workers that are lost.
        under_way: The activities of the run at each strike.
        different: The parts of the results that have other bits than they should have.
        missed: The expectations that were not met.
    """

    noticed_s: float | None
    back_s: float | None
    results_s: float | None = None
    num_lost: int | None = None
    under_way: Sequence[str] = ()
    different: Sequence[str] = ()
    missed: Sequence[str] = ()

    @property
    def seconds(self) -> tuple[float | None, ...]:
        """One number for each of the columns `_TIMES`."""
        return self.noticed_s, self.back_s, self.results_s

    @property
    def verdict(self) -> str:
        """The last column."""
        bits = f"NO: {', '.join(self.different)}" if self.different else "yes"
        return "; ".join([bits, *(f"EXPECTED {one}" for one in self.missed)])


_TIMES = ("noticed", "back", "results")
_LEGEND = """
noticed: until the loss or the leaving of the struck worker is known, or until no process of a killed driver is left
back: from the last strike, or the start of a worker that joins or of a driver, until the workers can be called again
results: from the last strike until the struck round has all of its results; all in seconds
lost: workers that were lost, under way: what the run was doing at each strike
bits equal: whether the results are those of an undisturbed run
"""


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
        self._title = ""
        self._rows: dict[str, list[Observed | None]] = {}  # title -> rows

    @property
    def num_problems(self) -> int:
        """How many failures there are; chaos has passed if there are none."""
        return self.num_hangs + self.num_errors + self.num_different + self.num_missed + len(self.leftovers)

    def begin(self, title: str) -> None:
        """Begin a part of the table; the title says what is struck."""
        if not self._rows:
            print(_LEGEND)
        self._title, self._rows[title] = title, []
        self._print(["", title, "struck", *_TIMES, "lost", "under way", "bits equal"])

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
            print(f"     {what}: other bits: {', '.join(different)}", flush=True)

    def failed(self, what: str, error: Exception) -> None:
        """Add a hang or an error that no single fault accounts for."""
        print(f"     {what}: {self._problem(error)}", flush=True)

    def left_over(self, things: Sequence[str]) -> None:
        """Add things that are there after the end of a run."""
        self.leftovers += things
        for thing in things:
            print(f"     left over: {thing}", flush=True)

    def summary(self) -> None:
        """Print the totals, and the medians and maxima of the times."""
        num_faults = sum(map(len, self._rows.values()))
        print(
            f"\n{num_faults} faults, {self.num_hangs} hangs, {self.num_errors} errors, {self.num_different} "
            f"differences, {self.num_missed} missed expectations, {len(self.leftovers)} leftovers"
        )
        for title, rows in self._rows.items():
            parts = [f"{len(rows)} faults"]
            for column, name in enumerate(_TIMES):
                if values := [one for row in rows if row is not None and (one := row.seconds[column]) is not None]:
                    parts.append(f"{name} {statistics.median(values):.2f} s, at most {max(values):.2f} s")
            print(f"{title + ':':30}{'; '.join(parts)}")

    def _add(self, name: str, struck: Sequence[str], observed: Observed | None, verdict: str) -> None:
        self._rows[self._title].append(observed)
        seconds = observed.seconds if observed is not None else [None] * len(_TIMES)
        times = ["-" if value is None else f"{value:.2f}" for value in seconds]
        num_lost = "-" if observed is None or observed.num_lost is None else f"{observed.num_lost}"
        under_way = " | ".join(observed.under_way) if observed is not None else ""
        number = sum(map(len, self._rows.values()))
        self._print([f"{number}", name, ",".join(struck), *times, num_lost, under_way, verdict])

    def _print(self, cells: Sequence[str]) -> None:
        number, name, struck, *numbers, under_way, verdict = cells
        columns = "".join(f"{cell:>8}" for cell in numbers)
        print(f"{number:>3}  {name:37}{struck:24}{columns}  {under_way:40}  {verdict}", flush=True)

    def _problem(self, error: Exception) -> str:
        is_hang = isinstance(error, HangError)
        self.num_hangs += is_hang
        self.num_errors += not is_hang
        return f"HANG: {error}" if is_hang else f"ERROR: {error!r}"
