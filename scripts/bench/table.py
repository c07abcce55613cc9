"""What torchfedrpc costs beside raw torch RPC, plain loops and its peers, as ratios measured side by side in one run.

Contenders are programs of their own (contenders/), which do the same work; their results are compared before they are
timed, and their batches alternate. Of time (ours / theirs) less is better, of speed (theirs / ours) more. Peers run
in environments of their own, made by scripts/bench/setup-peers; the table names those that are not installed.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

import table_report
from table_measure import FULL, QUICK, RowResult, measured, smoked
from table_report import HEADER, cells, on_terminal
from table_rows import US, Row, rows, without_peers


def main() -> int:
    """Measure and print; 1 where torchfedrpc gave no numbers, or a contender failed or gave another result."""
    arguments = parse()
    if arguments.list:
        for row in rows():
            print(f"{row.name:14}{row.title}")
        return 0
    is_quick = arguments.quick or arguments.smoke
    chosen = [row for row in rows(quick=is_quick) if arguments.rows is None or row.name in arguments.rows]
    if is_quick and not arguments.peers:
        chosen = [without_peers(row) for row in chosen]
    if arguments.smoke:
        return smoke(chosen)
    effort = QUICK if arguments.quick else FULL
    began, load_before = datetime.now(), table_report.load()
    print(f"{table_report.machine()}\nload {load_before}\n\n{on_terminal([HEADER])}", flush=True)
    results = []
    for result in measured(chosen, effort):
        results.append(result)
        print(on_terminal(cells(result)), flush=True)
    print(f"\nload {table_report.load()}, {(datetime.now() - began).total_seconds():.0f} s")
    path = arguments.report or (None if arguments.quick or arguments.rows else table_report.default_path(began))
    if path is not None:
        options = [*(["--quick"] if arguments.quick else []), *(["--peers"] if arguments.peers else [])]
        options += ["--rows", ",".join(arguments.rows)] if arguments.rows is not None else []
        command = " ".join(["scripts/bench/table", *options])
        table_report.write(path, results, command, began=began, load_before=load_before)
        print(f"report: {path}")
    return tell_failures(results)


def smoke(chosen: Sequence[Row]) -> int:
    """Do the work of each row once; 1 if a contender failed or gave another result."""
    results = []
    for result in smoked(chosen):
        results.append(result)
        labels = [entry.label for entry in result.row.entries if entry.label not in result.unable]
        print(f"{result.row.name:14}{', '.join(labels)}: {'one result' if len(labels) > 1 else 'done'}", flush=True)
    return tell_failures(results)


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="in two minutes, with more noise; no peers, no report")
    parser.add_argument("--peers", action="store_true", help="with --quick or --smoke: the peers as well")
    parser.add_argument("--smoke", action="store_true", help="all rows once, results compared, nothing timed")
    parser.add_argument("--rows", metavar="A,B", type=lambda text: text.split(","), help="these rows alone")
    parser.add_argument("--list", action="store_true", help="list the rows and end")
    parser.add_argument(
        "--report", metavar="PATH", type=Path, help="the report's file (default: results/DATE-HHMM.md)"
    )
    arguments = parser.parse_args()
    names = [row.name for row in rows()]
    if unknown := [name for name in arguments.rows or [] if name not in names]:
        parser.error(f"no row {', '.join(unknown)}; there are {', '.join(names)}")
    return arguments


def tell_failures(results: Sequence[RowResult]) -> int:
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


if __name__ == "__main__":
    sys.exit(main())
