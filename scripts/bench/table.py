"""The cost of torchfedrpc beside raw torch RPC, plain loops and its peers, as ratios measured in one run.

Contenders are separate programs (contenders/), which do the same work; their results are compared before they are
timed, and their batches alternate. Of time (ours / theirs) less is better, of speed (theirs / ours) more. Peers run
in separate environments, made by scripts/bench/setup-peers; the table names those that are not installed.
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
import textwrap
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

from table_measure import RowResult, Spread, measured, smoked
from table_rows import US, Line, Row, rows, without_peers

# The table as text.

RESULTS = Path(__file__).parent / "results"
HEADER = (
    *("what", "torchfedrpc: median", "mean", "against", "theirs: median", "mean"),
    *("ratio of medians", "spread", "of means", "target", "met"),
)
_WIDTHS = (62, 19, 10, 22, 14, 10, 17, 18, 14, 17, 4)
_UNITS = {"_mb": "MB", "_s": "s", "_percent": "%", "_by_median": "x"}

Cells = tuple[str, ...]


def cells(result: RowResult) -> list[Cells]:
    """The lines of a row, each with a cell for each column of `HEADER`."""
    if US not in result.batches:
        return [(result.row.title, _why(result, US), *("" for _ in HEADER[2:]))]
    return [_cells(result, line) for line in result.row.lines]


def _cells(result: RowResult, line: Line) -> Cells:
    what = f"{result.row.title}: {line.what}" if line.what else result.row.title
    against, target = line.against or "", _target(line)
    own = _median_and_mean(result, line, US)
    if line.against is not None and line.against not in result.batches:
        return what, *own, against, _why(result, line.against), "", "", "", "", target, ""
    theirs, compared, spread = ("", ""), ("", ""), result.compared(line)
    if line.against is not None:
        theirs = _median_and_mean(result, line, line.against)
        compared = _compared(line, spread.median), _compared(line, result.compared_means(line))
    met = {None: "", True: "yes", False: "NO"}[result.is_met(line)]
    return what, *own, against, *theirs, compared[0], _range(line, spread), compared[1], target, met


def _median_and_mean(result: RowResult, line: Line, label: str) -> tuple[str, str]:
    return number(result.median(line, label), line.quantity), number(result.mean(line, label), line.quantity)


def _why(result: RowResult, label: str) -> str:
    """The reason why a contender gives no numbers, in one short line."""
    return textwrap.shorten(str(result.unable.get(label, "no numbers")), 100)


def number(value: float, quantity: str) -> str:
    """A number with its unit."""
    if quantity != "seconds":
        unit = next(unit for suffix, unit in _UNITS.items() if quantity.endswith(suffix))
        return f"{value:.3g} {unit}" if abs(value) < 1000 else f"{value:,.0f} {unit}"
    if abs(value) < 1:
        return f"{1e3 * value:.3g} ms"
    return f"{value:.3g} s"


def _compared(line: Line, value: float) -> str:
    if line.kind in ("difference", "value"):
        return f"{'+' if line.kind == 'difference' and value > 0 else ''}{number(value, line.quantity)}"
    return f"{value:.2f} x {line.kind if line.quantity == 'seconds' else 'as much'}"


def _range(line: Line, spread: Spread) -> str:
    if line.kind in ("difference", "value"):
        return f"{number(spread.least, line.quantity)} .. {number(spread.most, line.quantity)}"
    return f"{spread.least:.2f} .. {spread.most:.2f}"


def _target(line: Line) -> str:
    if line.target is None:
        return ""
    of_what = " of means" if line.is_of_mean else ""
    if line.kind == "speed":
        return f">= {line.target:g} x{of_what}"
    return f"<= {line.target:g} x{of_what}" if line.kind == "time" else f"<= {number(line.target, line.quantity)}"


def on_terminal(lines: Sequence[Cells]) -> str:
    """Lines as columns of fixed width; longer cells run over."""
    return "\n".join(
        " ".join(cell.ljust(width) for cell, width in zip(line, _WIDTHS, strict=True)).rstrip() for line in lines
    )


def in_markdown(header: Cells, lines: Sequence[Cells]) -> str:
    """Lines as a Markdown table."""
    rule = tuple("---" for _ in header)
    return "\n".join(f"| {' | '.join(cell.replace('|', '/') for cell in line)} |" for line in (header, rule, *lines))


def machine() -> str:
    """Processor, cores and memory, in a line."""
    model = next((line.partition(":")[2].strip() for line in _lines("/proc/cpuinfo") if "model name" in line), "?")
    total = next((int(line.split()[1]) for line in _lines("/proc/meminfo") if line.startswith("MemTotal")), 0)
    cores = len(os.sched_getaffinity(0))
    return f"{model}, {cores} cores, {1.024e-6 * total:.0f} GB of memory, {platform.system()} {platform.machine()}"


def load() -> str:
    """The load averages over 1, 5 and 15 minutes."""
    return " ".join(f"{value:.2f}" for value in os.getloadavg())


def report(results: Sequence[RowResult], *, began: datetime, load_before: str) -> str:
    """The report of a run.

    Args:
        results: All rows.
        began: When the run began.
        load_before: The machine's load before the run.
    """
    versions: dict[str, dict[str, str]] = {}
    for result in results:
        for label, of_one in result.versions.items():
            versions.setdefault(label, {}).update(of_one)
    took_min = (datetime.now() - began).total_seconds() / 60
    sections = [
        f"# Benchmark of {began:%Y-%m-%d %H:%M}",
        f"Made by `scripts/bench/table` at {began:%H:%M}, in {took_min:.0f} min.",
        f"- machine: {machine()}\n- load before: {load_before}; after: {load()}",
        "\n".join(
            f"- {label}: {', '.join(f'{library} {version}' for library, version in of_one.items())}"
            for label, of_one in versions.items()
        ),
        "A median is that of the rounds' own medians, a mean that of all calls of all rounds, in which the "
        "contenders' batches alternate. The ratio of medians is the median of those of the rounds, with the least "
        "and the most beside it; the ratio of means is one of all calls. *time* is ours / theirs, *speed* theirs / "
        "ours. Contenders of a row had given the same result before they were timed.",
        in_markdown(HEADER, [line for result in results for line in cells(result)]),
    ]
    return "\n\n".join(sections) + "\n"


def _lines(path: str) -> list[str]:
    return Path(path).read_text(encoding="utf-8").splitlines()


# The command.


def main() -> int:
    """Measure and print; 1 where torchfedrpc gave no numbers, or a contender failed or gave another result."""
    arguments = parse()
    chosen = [row for row in rows(merged=arguments.smoke) if arguments.rows is None or row.name in arguments.rows]
    if arguments.list:
        for row in chosen:
            print(f"{row.name:18}{row.title}")
        return 0
    if arguments.smoke:
        return smoke(chosen if arguments.peers else [without_peers(row) for row in chosen])
    began, load_before = datetime.now(), load()
    print(f"{machine()}\nload {load_before}\n\n{on_terminal([HEADER])}", flush=True)
    results = []
    for result in measured(chosen):
        results.append(result)
        print(on_terminal(cells(result)), flush=True)
    print(f"\nload {load()}, {(datetime.now() - began).total_seconds():.0f} s")
    path = arguments.report or (None if arguments.rows else RESULTS / f"{began:%Y-%m-%d-%H%M}.md")
    if path is not None:
        path.write_text(report(results, began=began, load_before=load_before), encoding="utf-8")
        print(f"report: {path}")
    return print_failures(results)


def smoke(chosen: Sequence[Row]) -> int:
    """Do the work of each row once; 1 if a contender failed or gave another result."""
    results = []
    for result in smoked(chosen):
        results.append(result)
        labels = [entry.label for entry in result.row.entries if entry.label not in result.unable]
        print(f"{result.row.name:18}{', '.join(labels)}: {'one result' if len(labels) > 1 else 'done'}", flush=True)
    return print_failures(results)


def print_failures(results: Sequence[RowResult]) -> int:
    """Print the contenders that failed; 1 if there are any. A missed target is no failure: it may be noise."""
    failures = [
        f"{result.row.name}: {label}: {error}"
        for result in results
        for label, error in result.unable.items()
        if label == US or not error.expected
    ]
    for failure in failures:
        print(failure, file=sys.stderr)
    return 1 if failures else 0


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--smoke", action="store_true", help="all rows once, results compared, nothing timed")
    parser.add_argument("--peers", action="store_true", help="with --smoke: the peers as well")
    parser.add_argument("--rows", metavar="A,B", type=lambda text: text.split(","), help="these rows alone")
    parser.add_argument("--list", action="store_true", help="list the rows and end")
    parser.add_argument("--report", metavar="PATH", type=Path, help="the report's file (results/DATE-HHMM.md)")
    arguments = parser.parse_args()
    names = [row.name for row in rows()]
    if unknown := [name for name in arguments.rows or [] if name not in names]:
        parser.error(f"no row {', '.join(unknown)}; there are {', '.join(names)}")
    return arguments


if __name__ == "__main__":
    sys.exit(main())
