"""Summary of several runs: tables on the terminal, and a CSV file."""

from __future__ import annotations

import csv
import io
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TextIO

from torchfedrpc.experiments.history import CLIENT_HEADERS, TEST_ACCURACY, Cost
from torchfedrpc.experiments.sweeps.results import SEED, RunResult, differing, mean_and_std
from torchfedrpc.experiments.table import print_rows
from torchfedrpc.federation.watched_metric import sign_of
from torchfedrpc.private_files import replaced

_MAX_ROWS = 60

_Value = Callable[[RunResult], float | None]


def print_runs(runs: Sequence[RunResult], root: Path, stream: TextIO) -> None:
    """Write a row for each run, then the errors of those that failed.

    Args:
        runs: The runs.
        root: The folder that has theirs.
        stream: The output stream.
    """
    keys = differing(runs)
    scores = _scores(TEST_ACCURACY) | {"loss": lambda run: run.loss} | _client_scores(runs, TEST_ACCURACY)
    traffic = _traffic(runs)
    headers = ["job", *keys, "status", *map(_header, scores), "seconds", *traffic]
    rows = [
        [
            _name(run, root),
            *(run.shown(key) for key in keys),
            run.status,
            *(_number(score(run)) for score in scores.values()),
            f"{run.seconds:.1f}",
            *(f"{amount(run):.1f}" for amount in traffic.values()),
        ]
        for run in runs[:_MAX_ROWS]
    ]
    print_rows(headers, rows, stream)
    if len(runs) > _MAX_ROWS:
        print(f"and {len(runs) - _MAX_ROWS} more", file=stream)
    for run in runs:
        if run.error:
            print(f"job {_name(run, root)} failed: {run.error}", file=stream)


def print_groups(
    groups: Mapping[str, Sequence[RunResult]],
    stream: TextIO,
    *,
    metric: str = TEST_ACCURACY,
    target: float | None = None,
) -> None:
    """Write a row for each group: mean and standard deviation over its runs.

    Args:
        groups: Runs that differ in their seed alone, by a name.
        stream: The output stream.
        metric: The metric whose final and best values are shown.
        target: Value of the metric to which rounds, seconds and bytes are counted.
    """
    all_runs = [run for group in groups.values() for run in group]
    scores = _scores(metric) | _client_scores(all_runs, metric)
    amounts: dict[str, _Value] = {"seconds": lambda run: run.seconds, **_traffic(all_runs)}
    headers = ["settings", "runs", *map(_header, scores), *amounts]
    costs: dict[str, _Value] = {}
    if target is not None:
        costs = _costs(all_runs, target, metric)
        num_bytes = costs.pop("bytes")
        costs.pop("update_bytes", None)  # a column of the CSV file alone: tables are wide already
        if "MB" in amounts:
            costs["MB"] = _megabytes(num_bytes)
        headers += [f"reached {target:g}", *(f"{name.replace('_', ' ')} to it" for name in costs)]
    rows = []
    for name, runs in groups.items():
        done = [run for run in runs if run.is_done]
        row = [name, str(len(done))]
        row += [_spread(map(score, done), "{:.3f}") for score in scores.values()]
        row += [_spread(map(amount, done), "{:.1f}") for amount in amounts.values()]
        if target is not None:
            row.append(f"{sum(run.cost(target, metric) is not None for run in done)} of {len(done)}")
        rows.append([*row, *(_spread(map(cost, done), "{:.1f}") for cost in costs.values())])
    print_rows(headers, rows, stream)


def describe_states(runs: Sequence[RunResult]) -> str:
    """Return how many runs have which status, as a text."""
    counts = Counter(run.status for run in runs)
    return f"{len(runs)} jobs: {', '.join(f'{number} {status}' for status, number in counts.items()) or 'none'}"


def write_csv(
    runs: Sequence[RunResult], path: Path, *, metric: str = TEST_ACCURACY, target: float | None = None
) -> None:
    """Write a row for each run, with a column for each setting that differs.

    Args:
        runs: The runs.
        path: The output file.
        metric: A metric that has columns beside the test accuracy, and beside those of an evaluation by clients.
        target: Value of the metric to which rounds, seconds and bytes are counted.
    """
    keys = [key for key in differing(runs) if key != SEED]
    costs = {} if target is None else _costs(runs, target, metric)
    further = _scores(metric) | _client_scores(runs, metric)
    rows = []
    for run in runs:
        row: dict[str, object] = {
            "job": run.folder.name,
            "status": run.status,
            "overrides": " ".join(run.overrides),
            **{key: run.settings.get(key, "") for key in keys},
            "seed": run.seed,
            **{name: score(run) for name, score in _scores(TEST_ACCURACY).items()},
            "final_loss": run.loss,
            "num_rounds": len(run.records),
            "seconds": round(run.seconds, 3),
            "bytes": run.num_bytes,
        }
        row |= {name: score(run) for name, score in further.items()}
        row |= {f"{name}_to_target": count(run) for name, count in costs.items()}
        rows.append({**row, "output_dir": run.folder, "error": run.error})
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]) if rows else ["job"], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    with replaced(path) as file:
        file.write(text.getvalue().encode())


def _scores(metric: str) -> dict[str, _Value]:
    """Return the final and the best value of a metric, by name; no best one if its name does not tell which it is."""
    label = "accuracy" if metric == TEST_ACCURACY else metric
    scores: dict[str, _Value] = {f"final_{label}": lambda run: run.final(metric)}
    return scores if sign_of(metric) is None else {**scores, f"best_{label}": lambda run: run.best(metric)}


def _client_scores(runs: Sequence[RunResult], metric: str) -> dict[str, _Value]:
    """Return the final values of the clients' accuracies that a run has, by name, other than those of a metric."""

    def final(name: str) -> _Value:
        return lambda run: run.final(name)

    measured = {name for run in runs for record in run.records for name in record.more}
    return {f"final_{name}": final(name) for name in CLIENT_HEADERS if name in measured and name != metric}


def _header(name: str) -> str:
    kind, _, metric = name.partition("_")
    return f"{kind} {CLIENT_HEADERS.get(metric, metric.replace('_', ' '))}".rstrip()


def _costs(runs: Sequence[RunResult], target: float, metric: str) -> dict[str, _Value]:
    """Return what is counted until a run's metric reaches the target: name -> count of a run, None if it does not.

    Simulated seconds and the bytes of updates are among them if a run has them.
    """

    def of(count: Callable[[Cost], float | None]) -> _Value:
        return lambda run: None if (cost := run.cost(target, metric)) is None else count(cost)

    counts = {"rounds": of(lambda cost: cost.num_rounds), "seconds": of(lambda cost: round(cost.seconds, 3))}
    if any("simulated_seconds" in record.more for run in runs for record in run.records):
        counts["simulated_seconds"] = of(lambda cost: cost.simulated_seconds)
    counts["bytes"] = of(lambda cost: cost.num_bytes)
    if any("update_bytes" in record.more for run in runs for record in run.records):
        counts["update_bytes"] = of(lambda cost: cost.update_bytes)
    return counts


def _traffic(runs: Sequence[RunResult]) -> dict[str, Callable[[RunResult], float]]:
    """Return the column of traffic; none if there was none in any run, as in local mode."""
    return {"MB": lambda run: run.num_bytes / 1e6} if any(run.num_bytes for run in runs) else {}


def _megabytes(num_bytes: _Value) -> _Value:
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
