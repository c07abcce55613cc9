"""``torchfedrpc compare``: table, CSV file and picture of runs and sweeps, by the settings that differ."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from torchfedrpc.errors import ConfigError
from torchfedrpc.experiments import extras
from torchfedrpc.experiments.sweeps.results import SEED, RunResult, find_runs, grouped
from torchfedrpc.experiments.sweeps.summary import describe_states, print_groups, write_csv
from torchfedrpc.private_files import make_private
from torchfedrpc.run import cancel_end_report

_DESCRIPTION = (
    "Compare runs and sweeps: final and best test accuracy, seconds and bytes, as mean ± standard deviation over the "
    "runs that differ in their seed alone. Writes compare.csv (a row for each run) and compare.png."
)


def main(arguments: Sequence[str]) -> int:
    """Compare the runs in some folders.

    Returns:
        The exit status.

    Raises:
        ConfigError: If a folder has no run, or the target is no accuracy.
    """
    cancel_end_report()  # this process does not run a rank's script, even if a launcher's variables are set
    parser = argparse.ArgumentParser("torchfedrpc compare", description=_DESCRIPTION)
    parser.add_argument("folders", nargs="+", type=Path, metavar="DIR", help="output folder of a run or a sweep")
    parser.add_argument(
        "--target", type=float, metavar="ACCURACY", help="count rounds, seconds and MB to this test accuracy, 0 to 1"
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=Path(),
        metavar="DIR",
        help="folder for compare.csv and compare.png; default: .",
    )
    options = parser.parse_args(arguments)
    if options.target is not None and not 0 < options.target <= 1:
        raise ConfigError(f"--target is a test accuracy above 0, up to 1, not {options.target:g}")
    by_folder = {folder: _runs_in(folder) for folder in options.folders}
    runs = list({run.folder.resolve(): run for found in by_folder.values() for run in found}.values())
    groups = _groups(by_folder) if len(runs) == sum(map(len, by_folder.values())) else grouped(runs)
    print(describe_states(runs))
    print_groups(groups, sys.stdout, target=options.target)
    if not options.output.exists():
        make_private(options.output)
    write_csv(runs, options.output / "compare.csv", target=options.target)
    written = ["compare.csv"]
    if extras.available("matplotlib") and any(run.accuracy is not None for run in runs):
        from torchfedrpc.experiments.sweeps.plot import draw_runs  # noqa: PLC0415 - matplotlib is optional

        draw_runs(groups, options.output / "compare.png")
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
