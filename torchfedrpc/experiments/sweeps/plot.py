"""Plot of several runs: mean and spread over seeds, drawn by matplotlib."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from torchfedrpc.experiments.sweeps.results import RunResult, mean_and_std
from torchfedrpc.private_files import replaced

_MAX_GROUPS = 12
_LABEL_WIDTH = 40


def draw_runs(groups: Mapping[str, Sequence[RunResult]], path: Path) -> None:
    """Plot the test accuracy of groups of runs into a PNG file: by rounds, and at the end with one dot per run.

    Runs that are not done are left out.

    Of more than twelve groups, those with the best mean final accuracy are shown.

    Args:
        groups: Runs that differ in their seed alone, by a name.
        path: The output file.
    """
    measured = {
        name: [run for run in runs if run.is_done and run.accuracy is not None] for name, runs in groups.items()
    }
    measured = {name: runs for name, runs in measured.items() if runs}
    shown = sorted(measured, key=lambda name: -_mean_accuracy(measured[name]))[:_MAX_GROUPS]
    labels = [_label(name, len(measured[name])) for name in shown]
    num_lines = sum(2 + label.count("\n") for label in labels)  # with one between labels
    figure = Figure(figsize=(12, max(4.0, 1.0 + 0.18 * num_lines)), layout="constrained")
    curves, ends = figure.subplots(1, 2, width_ratios=[3, 2])
    colours = matplotlib.colormaps["tab10"].colors  # type: ignore[attr-defined]
    for row, name in enumerate(shown):
        runs, colour = measured[name], colours[row % len(colours)]
        means, spreads = _by_round(runs)
        num_done = range(1, len(means) + 1)
        marker = "." if len(means) < 3 else None
        curves.plot(num_done, means, color=colour, linestyle="-" if row < len(colours) else "--", marker=marker)
        lower, upper = ([mean + sign * std for mean, std in zip(means, spreads, strict=True)] for sign in (-1, 1))
        curves.fill_between(num_done, lower, upper, color=colour, alpha=0.15, linewidth=0)
        values = [run.accuracy for run in runs if run.accuracy is not None]
        mean, std = mean_and_std(values) or (0.0, 0.0)
        ends.plot(values, [row] * len(values), "o", color=colour, alpha=0.35, markersize=5)
        ends.errorbar(mean, row, xerr=std, fmt="D", color=colour, capsize=4, markersize=6)
    curves.set_xlabel("rounds")
    curves.set_ylabel("test accuracy")
    curves.xaxis.set_major_locator(MaxNLocator(integer=True))
    ends.set_xlabel("final test accuracy (mean ± std, runs)")
    ends.yaxis.tick_right()
    ends.set_yticks(range(len(shown)), labels, fontsize="small")
    for row, label in enumerate(ends.get_yticklabels()):
        label.set_color(colours[row % len(colours)])
    ends.set_ylim(len(shown) - 0.5, -0.5)
    for axes in (curves, ends):
        axes.grid(alpha=0.3)
    if len(measured) > len(shown):
        figure.suptitle(f"the {len(shown)} best of {len(measured)} settings", fontsize="medium")
    with replaced(path) as file:
        figure.savefig(file, dpi=120, format="png")


def _by_round(runs: Sequence[RunResult]) -> tuple[list[float], list[float]]:
    """Return mean and standard deviation of the test accuracy for each round that all runs have."""
    series = [[record.test_accuracy for record in run.records if record.test_accuracy is not None] for run in runs]
    spreads = [mean_and_std(column) or (0.0, 0.0) for column in zip(*filter(None, series), strict=False)]
    return [mean for mean, _ in spreads], [std for _, std in spreads]


def _mean_accuracy(runs: Sequence[RunResult]) -> float:
    mean, _ = mean_and_std(run.accuracy for run in runs) or (0.0, 0.0)
    return mean


def _label(name: str, num_runs: int) -> str:
    lines = textwrap.wrap(name, _LABEL_WIDTH, break_long_words=False, break_on_hyphens=False) or [name]
    return "\n".join(lines) + f" ({num_runs})"
