"""``torchfedrpc compare``: table, CSV file and picture of runs and sweeps, by the settings that differ."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from torchfedrpc.errors import ConfigError, suggest
from torchfedrpc.experiments import extras
from torchfedrpc.experiments.history import TEST_ACCURACY
from torchfedrpc.experiments.sweeps.results import SEED, RunResult, find_runs, grouped
from torchfedrpc.experiments.sweeps.summary import describe_states, print_groups, write_csv
from torchfedrpc.federation.watched_metric import check_target, sign_of
from torchfedrpc.private_files import make_private
from torchfedrpc.run import cancel_end_report

_DESCRIPTION = (
    "Compare runs and sweeps: final and best test accuracy, or another metric, seconds and bytes, as mean ± standard "
    "deviation over the runs that differ in their seed alone. Writes compare.csv (a row for each run) and "
    "compare.png."
)


def main(arguments: Sequence[str]) -> int:
    """Compare the runs in some folders.

    Returns:
        The exit status.

    Raises:
        ConfigError: If a folder has no run, no run has the metric, or it cannot have this target.
    """
    cancel_end_report()  # this process does not run a rank's script, even if a launcher's variables are set
    parser = argparse.ArgumentParser("torchfedrpc compare", description=_DESCRIPTION)
    parser.add_argument("folders", nargs="+", type=Path, metavar="DIR", help="output folder of a run or a sweep")
    parser.add_argument(
        "--metric",
        default=TEST_ACCURACY,
        metavar="NAME",
        help=f"metric of history.jsonl, such as client_accuracy; default: {TEST_ACCURACY}",
    )
    parser.add_argument(
        "--target",
        type=float,
        metavar="VALUE",
        help="count rounds, seconds and MB until the metric is as good as this",
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=Path(),
        metavar="DIR",
        help="folder for compare.csv and compare.png; default: .",
    )
    options = parser.parse_args(arguments)
    by_folder = {folder: _runs_in(folder) for folder in options.folders}
    runs = list({run.folder.resolve(): run for found in by_folder.values() for run in found}.values())
    metric, target = options.metric, options.target
    known = {TEST_ACCURACY, *(name for run in runs for record in run.records for name in record.metrics)}
    if metric not in known:
        raise ConfigError(f"compare: no run has the metric {metric!r}{suggest(metric, known)}")
    if target is not None:
        check_target("compare", metric, target)
        if sign_of(metric) is None:
            raise ConfigError(
                f"compare: --target needs a metric of accuracy, loss or spread; the name of {metric} does not tell "
                f"whether lower or higher values are better"
            )
    groups = _groups(by_folder) if len(runs) == sum(map(len, by_folder.values())) else grouped(runs)
    print(describe_states(runs))
    print_groups(groups, sys.stdout, metric=metric, target=target)
    if not options.output.exists():
        make_private(options.output)
    write_csv(runs, options.output / "compare.csv", metric=metric, target=target)
    written = ["compare.csv"]
    if extras.available("matplotlib") and any(run.final(metric) is not None for run in runs):
        from torchfedrpc.experiments.sweeps.plot import draw_runs  # noqa: PLC0415 - matplotlib is optional

        draw_runs(groups, options.output / "compare.png", metric=metric)
        written.append("compare.png")
    print(f"written: {', '.join(str(options.output / name) for name in written)}")
    return 0


def _runs_in(folder: Path) -> list[RunResult]:
    runs = find_runs(folder)
    if not runs:
        raise ConfigError(
            f"{folder} has no run: name the output folder of a run (with history.jsonl), or a folder of such "
            f"folders, as that of a sweep"
        )
    return runs


def _groups(by_folder: dict[Path, list[RunResult]]) -> dict[str, list[RunResult]]:
    """Group runs by settings; by folders as well if two folders have a run with the same settings and seed."""
    runs = [run for found in by_folder.values() for run in found]
    groups = grouped(runs)
    if all(len({run.settings.get(SEED) for run in group}) == len(group) for group in groups.values()):
        return groups
    folder_of = {id(run): folder for folder, found in by_folder.items() for run in found}
    split: dict[str, list[RunResult]] = {}
    for name, group in groups.items():
        for run in group:
            place = str(folder_of[id(run)])
            split.setdefault(place if name == "all" else f"{place} {name}", []).append(run)
    return split
