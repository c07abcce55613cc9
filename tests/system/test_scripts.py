"""The scripts of this project that run others."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from folders import ROOT

SCRIPTS = ROOT / "scripts"
RUN_BY_NIGHT = ["test", "lower-bounds", "chaos/run", "bench/table"]
SET_UP = ["setup dev,experiments,test,integrations"]
RUN_BY_CI = ["setup", "check", "docs", "test", "chaos/run", "bench/table"]
CI = ROOT / ".ci" / "run"


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A tree with scripts that run others, for which there are stubs that write their arguments to `ran`."""
    for folder in ("scripts/bench", "scripts/chaos", ".ci"):
        (tmp_path / folder).mkdir(parents=True)
    shutil.copy(SCRIPTS / "nightly", tmp_path / "scripts")
    if CI.exists():
        shutil.copy(CI, tmp_path / ".ci")
    for name in {*RUN_BY_CI, *RUN_BY_NIGHT}:
        assert os.access(SCRIPTS / name, os.X_OK)
        script = tmp_path / "scripts" / name
        script.write_text(f'#!/bin/sh\necho {name} "$@" >>ran\n[ "$FAILING" != {name} ]\n')
        script.chmod(0o755)
    return tmp_path


def run(tree: Path, *command: str, failing: str = "") -> tuple[subprocess.CompletedProcess[str], list[str]]:
    """Run a script; returns its end, and the lines of the scripts that it ran."""
    done = subprocess.run(
        [tree / command[0], *command[1:]],
        env=os.environ | {"FAILING": failing},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    return done, (tree / "ran").read_text().splitlines()


def nightly(tree: Path, *arguments: str, failing: str = "") -> tuple[subprocess.CompletedProcess[str], list[str]]:
    """Run the nightly script."""
    return run(tree, "scripts/nightly", *arguments, failing=failing)


@pytest.mark.skipif(not CI.exists(), reason="the sources of a release are without it")
@pytest.mark.parametrize("failing", ["", *RUN_BY_CI])
def test_continuous_integration_runs_all_and_fails_if_one_of_them_does(tree: Path, failing: str) -> None:
    done, ran = run(tree, ".ci/run", failing=failing)
    assert (done.returncode != 0) == bool(failing)
    if not failing:
        assert sorted(ran) == ["bench/table --smoke", "chaos/run --quick", "check", "docs", *SET_UP, "test"]


@pytest.mark.parametrize("failing", RUN_BY_NIGHT)
def test_the_nightly_script_runs_all_and_fails_if_one_of_them_does(tree: Path, failing: str) -> None:
    done, ran = nightly(tree, failing=failing)
    assert [line.split()[0] for line in ran] == ["test", "lower-bounds", "chaos/run", "chaos/run", "bench/table"]
    assert done.returncode == 1
    assert f"nightly: failed: scripts/{failing}" in done.stderr


def test_the_nightly_script_prints_a_fresh_seed_and_takes_an_earlier_one(tree: Path) -> None:
    seeds = []
    for _ in range(2):
        done, _ = nightly(tree)
        assert done.returncode == 0
        seeds += re.findall(r"scripts/chaos/run --seed (\d+)", done.stdout)
    assert len(set(seeds)) == 2
    options = ("", " --stateless")
    assert nightly(tree, seeds[0])[1][2:4] == [f"chaos/run{option} --seed {seeds[0]}" for option in options]
