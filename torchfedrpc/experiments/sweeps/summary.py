"""Summary of several runs: tables on the terminal, and a CSV file."""

from __future__ import annotations

import csv
import io
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TextIO

from torchfedrpc.experiments.history import Cost
from torchfedrpc.experiments.sweeps.results import SEED, RunResult, differing, mean_and_std
from torchfedrpc.experiments.table import print_rows
from torchfedrpc.private_files import replaced

_MAX_ROWS = 60


def print_runs(runs: Sequence[RunResult], root: Path, stream: TextIO) -> None:
    """Write a row for each run, then the errors of those that failed.

    Args:
        runs: The runs.
        root: The folder that has theirs.
        stream: The output stream.
    """
    keys = differing(runs)
    headers = ["job", *keys, "status", "final accuracy", "best accuracy", "loss", "seconds", "MB"]
    rows = [
        [
            _name(run, root),
            *(run.shown(key) for key in keys),
            run.status,
            _number(run.accuracy),
            _number(run.best_accuracy),
            _number(run.loss),
            f"{run.seconds:.1f}",
            f"{run.num_bytes / 1e6:.1f}",
        ]
        for run in runs[:_MAX_ROWS]
    ]
    print_rows(headers, rows, stream)
    if len(runs) > _MAX_ROWS:
        print(f"and {len(runs) - _MAX_ROWS} more", file=stream)
    for run in runs:
        if run.error:
            print(f"job {_name(run, root)} failed: {run.error}", file=stream)


def print_groups(groups: Mapping[str, Sequence[RunResult]], stream: TextIO, *, target: float | None = None) -> None:
    """Write a row for each group: mean and standard deviation over its runs.

    Args:
        groups: Runs that differ in their seed alone, by a name.
        stream: The output stream.
        target: Test accuracy, 0 to 1, to which rounds, seconds and bytes are counted.
    """
    headers = ["settings", "runs", "final accuracy", "best accuracy", "seconds", "MB"]
    columns: list[Callable[[RunResult], float | None]] = [
        lambda run: run.accuracy,
        lambda run: run.best_accuracy,
        lambda run: run.seconds,
        lambda run: run.num_bytes / 1e6,
    ]
    formats = ["{:.3f}", "{:.3f}", "{:.1f}", "{:.1f}"]
    if target is not None:
        costs = _costs([run for group in groups.values() for run in group], target)
        costs["MB"] = _megabytes(costs.pop("bytes"))
        headers += [f"reached {target:g}", *(f"{name.replace('_', ' ')} to it" for name in costs)]
        columns += costs.values()
        formats += ["{:.1f}"] * len(costs)
    rows = []
    for name, runs in groups.items():
        done = [run for run in runs if run.is_done]
        cells = [_spread(map(column, done), text) for column, text in zip(columns, formats, strict=True)]
        if target is not None:
            num_reached = sum(run.cost(target) is not None for run in done)
            cells.insert(4, f"{num_reached} of {len(done)}")
        rows.append([name, str(len(done)), *cells])
    print_rows(headers, rows, stream)


def describe_states(runs: Sequence[RunResult]) -> str:
    """Return how many runs have which status, as a text."""
    counts = Counter(run.status for run in runs)
    return f"{len(runs)} jobs: {', '.join(f'{number} {status}' for status, number in counts.items()) or 'none'}"


def write_csv(runs: Sequence[RunResult], path: Path, *, target: float | None = None) -> None:
    """Write a row for each run, with a column for each setting that differs.

    Args:
        runs: The runs.
        path: The output file.
        target: Test accuracy, 0 to 1, to which rounds, seconds and bytes are counted.
    """
    keys = [key for key in differing(runs) if key != SEED]
    costs = {} if target is None else _costs(runs, target)
    rows = []
    for run in runs:
        row: dict[str, object] = {
            "job": run.folder.name,
            "status": run.status,
            "overrides": " ".join(run.overrides),
            **{key: run.settings.get(key, "") for key in keys},
            "seed": run.seed,
            "final_accuracy": run.accuracy,
            "best_accuracy": run.best_accuracy,
            "final_loss": run.loss,
            "num_rounds": len(run.records),
            "seconds": round(run.seconds, 3),
            "bytes": run.num_bytes,
        }
        row |= {f"{name}_to_target": count(run) for name, count in costs.items()}
        rows.append({**row, "output_dir": run.folder, "error": run.error})
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]) if rows else ["job"], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    with replaced(path) as file:
        file.write(text.getvalue().encode())


def _costs(runs: Sequence[RunResult], target: float) -> dict[str, Callable[[RunResult], float | None]]:
    """Return what is counted until a run reaches the target: name -> count of a run, None if it does not.

    Simulated seconds are among them if a run has them.
    """

    def of(count: Callable[[Cost], float | None]) -> Callable[[RunResult], float | None]:
        return lambda run: None if (cost := run.cost(target)) is None else count(cost)

    counts = {"rounds": of(lambda cost: cost.num_rounds), "seconds": of(lambda cost: round(cost.seconds, 3))}
    if any("simulated_seconds" in record.more for run in runs for record in run.records):
        counts["simulated_seconds"] = of(lambda cost: cost.simulated_seconds)
    return {**counts, "bytes": of(lambda cost: cost.num_bytes)}


def _megabytes(num_bytes: Callable[[RunResult], float | None]) -> Callable[[RunResult], float | None]:
    return lambda run: None if (found := num_bytes(run)) is None else found / 1e6


def _spread(values: Iterable[float | None], text: str) -> str:
    known = [value for value in values if value is not None]
    found = mean_and_std(known)
    if found is None:
        return "-"
    return text.format(found[0]) if len(known) == 1 else f"{text.format(found[0])} ± {text.format(found[1])}"


def _name(run: RunResult, root: Path) -> str:
    return str(run.folder.relative_to(root)) if run.folder.is_relative_to(root) else str(run.folder)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
