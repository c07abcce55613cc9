"""Plot of several runs: mean and spread over seeds, drawn by matplotlib."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from torchfedrpc.experiments.history import TEST_ACCURACY
from torchfedrpc.experiments.sweeps.results import RunResult, mean_and_std
from torchfedrpc.federation.watched_metric import sign_of
from torchfedrpc.private_files import replaced

_MAX_GROUPS = 12
_LABEL_WIDTH = 40


def draw_runs(groups: Mapping[str, Sequence[RunResult]], path: Path, *, metric: str = TEST_ACCURACY) -> None:
    """Plot a metric of groups of runs into a PNG file: by rounds, and at the end with one dot per run.

    Runs that are not done are left out.

    Of more than twelve groups, those with the best mean final value are shown; the first ones if the name of the
    metric does not tell which values are better.

    Args:
        groups: Runs that differ in their seed alone, by a name.
        path: The output file.
        metric: The metric.
    """
    measured = {
        name: [run for run in runs if run.is_done and run.final(metric) is not None] for name, runs in groups.items()
    }
    measured = {name: runs for name, runs in measured.items() if runs}
    sign, title = sign_of(metric), metric.replace("_", " ")
    shown = sorted(measured, key=lambda name: -(sign or 0.0) * _mean(measured[name], metric))[:_MAX_GROUPS]
    labels = [_label(name, len(measured[name])) for name in shown]
    num_lines = sum(2 + label.count("\n") for label in labels)  # with one between labels
    figure = Figure(figsize=(12, max(4.0, 1.0 + 0.18 * num_lines)), layout="constrained")
    curves, ends = figure.subplots(1, 2, width_ratios=[3, 2])
    colours = matplotlib.colormaps["tab10"].colors  # type: ignore[attr-defined]
    for row, name in enumerate(shown):
        runs, colour = measured[name], colours[row % len(colours)]
        num_done, means, spreads = _by_round(runs, metric)
        marker = "." if len(means) < 3 else None
        curves.plot(num_done, means, color=colour, linestyle="-" if row < len(colours) else "--", marker=marker)
        lower, upper = ([mean + sign * std for mean, std in zip(means, spreads, strict=True)] for sign in (-1, 1))
        curves.fill_between(num_done, lower, upper, color=colour, alpha=0.15, linewidth=0)
        values = [value for run in runs if (value := run.final(metric)) is not None]
        mean, std = mean_and_std(values) or (0.0, 0.0)
        ends.plot(values, [row] * len(values), "o", color=colour, alpha=0.35, markersize=5)
        ends.errorbar(mean, row, xerr=std, fmt="D", color=colour, capsize=4, markersize=6)
    curves.set_xlabel("rounds")
    curves.set_ylabel(title)
    curves.xaxis.set_major_locator(MaxNLocator(integer=True))
    ends.set_xlabel(f"final {title} (mean ± std, runs)")
    ends.yaxis.tick_right()
    ends.set_yticks(range(len(shown)), labels, fontsize="small")
    for row, label in enumerate(ends.get_yticklabels()):
        label.set_color(colours[row % len(colours)])
    ends.set_ylim(len(shown) - 0.5, -0.5)
    for axes in (curves, ends):
        axes.grid(alpha=0.3)
    if len(measured) > len(shown):
        chosen = f"{len(shown)}" if sign is None else f"the {len(shown)} best"
        figure.suptitle(f"{chosen} of {len(measured)} settings", fontsize="medium")
    with replaced(path) as file:
        figure.savefig(file, dpi=120, format="png")


def _by_round(runs: Sequence[RunResult], metric: str) -> tuple[list[int], list[float], list[float]]:
    """Return numbers of rounds, and mean and standard deviation of the metric after each that all runs measured."""
    measured = [{record.round + 1: record.metrics.get(metric) for record in run.records} for run in runs]
    series = [{count: value for count, value in one.items() if value is not None} for one in measured]
    series = [one for one in series if one]
    shared = [count for count in series[0] if all(count in one for one in series)] if series else []
    spreads = [mean_and_std(one[count] for one in series) or (0.0, 0.0) for count in shared]
    return shared, [mean for mean, _ in spreads], [std for _, std in spreads]


def _mean(runs: Sequence[RunResult], metric: str) -> float:
    mean, _ = mean_and_std(run.final(metric) for run in runs) or (0.0, 0.0)
    return mean


def _label(name: str, num_runs: int) -> str:
    lines = textwrap.wrap(name, _LABEL_WIDTH, break_long_words=False, break_on_hyphens=False) or [name]
    return "\n".join(lines) + f" ({num_runs})"
