"""The comparison of algorithms: its stored results are those of the docs, and have the order that the papers have."""

from __future__ import annotations

import asyncio
import importlib
import json
import math
import statistics
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType

import pytest
from conftest import needs
from folders import ROOT
from processes import environment

RESULTS = json.loads((ROOT / "scripts" / "bench" / "results" / "methods.json").read_text(encoding="utf-8"))
CLAIMS = [
    ("label-skew", "SCAFFOLD", "FedAvg", 0.8),
    ("unequal-steps", "FedNova, not tuned", "FedAvg, not tuned", 0.9),
    ("stragglers", "FedProx, takes their epoch", "FedAvg, drops them", 0.1),
    ("attackers", "trimmed mean", "mean", 0.5),
    ("attackers", "Krum", "mean", 0.5),
    ("attackers", "multi-Krum", "mean", 0.5),
    ("feature-skew", "FedBN", "FedAvg", 0.3),
    ("feature-skew", "Ditto", "FedAvg", 0.3),
    ("slow-clients", "FedBuff", "FedAvg", 0.5),
]
"""Comparison, the better algorithm, the worse one, and at most which fraction of its rounds or seconds the better one
needs, or how much more accuracy it has at least."""


@pytest.fixture(scope="module")
def methods() -> Iterator[ModuleType]:
    needs("sklearn")
    needs("matplotlib")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "scripts" / "bench")
        yield importlib.import_module("methods")
        del sys.modules["methods"]  # other tests have files of this name


def check(name: str, better: Sequence[float], worse: Sequence[float], margin: float, *, has_target: bool) -> None:
    """Check that runs are better by a margin in the mean."""
    ours, theirs = statistics.fmean(better), statistics.fmean(worse)
    assert math.isfinite(ours), (name, better)
    if has_target:
        assert ours <= margin * theirs, (name, better, worse)
    else:
        assert ours >= margin + theirs, (name, better, worse)


def test_the_docs_have_the_table_of_the_stored_results(methods: ModuleType) -> None:
    assert methods.table(RESULTS) in (ROOT / "docs" / "algorithms.md").read_text(encoding="utf-8")


def test_each_tuned_learning_rate_lies_inside_of_its_grid(methods: ModuleType) -> None:
    ends = (methods.RATES[0], methods.RATES[-1])
    at_an_end = [
        (name, method.name)
        for name, comparison in methods.COMPARISONS.items()
        for method in comparison.methods
        if RESULTS[name][method.name]["chosen"]["learning_rate"] in ends
    ]
    assert at_an_end == [("feature-skew", "FedAvg")]
    assert max(RESULTS["feature-skew"]["FedAvg"]["tuning"]) < 0.1  # the level of chance at all of them


@pytest.mark.parametrize(("name", "better", "worse", "margin"), CLAIMS)
def test_stored_results_have_the_order_of_the_papers(
    methods: ModuleType, name: str, better: str, worse: str, margin: float
) -> None:
    found, has_target = RESULTS[name], methods.COMPARISONS[name].has_target
    check(name, found[better]["values"], found[worse]["values"], margin, has_target=has_target)


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize(("name", "better", "worse", "margin"), CLAIMS)
def test_runs_have_the_order_of_the_papers(
    methods: ModuleType, name: str, better: str, worse: str, margin: float
) -> None:
    comparison = methods.COMPARISONS[name]
    values = {
        method.name: [
            asyncio.run(methods.run(comparison, method, RESULTS[name][method.name]["chosen"], seed))
            for seed in range(5)
        ]
        for method in comparison.methods
        if method.name in (better, worse)
    }
    check(name, values[better], values[worse], margin, has_target=comparison.has_target)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_the_command_tunes_runs_and_draws(tmp_path: Path) -> None:
    needs("sklearn")
    needs("matplotlib")
    script, picture, results = ROOT / "scripts" / "bench" / "methods.py", tmp_path / "a.png", tmp_path / "a.json"
    command = [sys.executable, str(script), "slow-clients", "--seeds=1", f"--picture={picture}"]
    done = subprocess.run(
        [*command, f"--results={results}"],
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
        env=environment(),
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert [line.split(" | ")[2] for line in done.stdout.splitlines()[2:]] == ["FedAvg", "FedBuff"]
    assert set(json.loads(results.read_text(encoding="utf-8"))["slow-clients"]) == {"FedAvg", "FedBuff"}
    assert picture.read_bytes().startswith(b"\x89PNG")
