"""The report of a run: a dated Markdown file with the table, and the machine and versions that it was measured on."""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

from table_measure import RowResult
from table_text import HEADER, Cells, cells, in_markdown

RESULTS = Path(__file__).parent / "results"


def machine() -> str:
    """Processor, cores and memory, in a line."""
    model = next((line.partition(":")[2].strip() for line in _lines("/proc/cpuinfo") if "model name" in line), "?")
    total = next((int(line.split()[1]) for line in _lines("/proc/meminfo") if line.startswith("MemTotal")), 0)
    cores = len(os.sched_getaffinity(0))
    return f"{model}, {cores} cores, {1.024e-6 * total:.0f} GB of memory, {platform.system()} {platform.machine()}"


def load() -> str:
    """The load averages over 1, 5 and 15 minutes."""
    return " ".join(f"{value:.2f}" for value in os.getloadavg())


def default_path(now: datetime) -> Path:
    """Where the report of a full run goes."""
    return RESULTS / f"{now:%Y-%m-%d-%H%M}.md"


def write(
    path: Path,
    results: Sequence[RowResult],
    stages: Sequence[Cells],
    command: str,
    *,
    began: datetime,
    load_before: str,
) -> None:
    """Write the report of a run.

    Args:
        path: of the file; one that is there is replaced.
        results: all rows.
        stages: the lines of the table of stages, its header first; none where it was not measured.
        command: what was run.
        began: when.
        load_before: the machine's load before the run.
    """
    versions: dict[str, dict[str, str]] = {}
    for result in results:
        for label, of_one in result.versions.items():
            versions.setdefault(label, {}).update(of_one)
    took_min = (datetime.now() - began).total_seconds() / 60
    sections = [
        f"# Benchmark of {began:%Y-%m-%d %H:%M}",
        f"Made by `{command}` at {began:%H:%M}, in {took_min:.0f} min.",
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
    if stages:
        sections += ["Where the time of an awaited no-op call goes:", in_markdown(stages[0], stages[1:])]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n\n".join(sections) + "\n", encoding="utf-8")


def _lines(path: str) -> list[str]:
    return Path(path).read_text(encoding="utf-8").splitlines()
