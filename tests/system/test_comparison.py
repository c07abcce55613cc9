"""The comparison of algorithms: its table has the order that the papers have, for one seed of two of its tasks."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from conftest import needs
from folders import ROOT
from processes import environment


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_comparison_has_the_order_of_the_papers(tmp_path: Path) -> None:
    needs("sklearn")
    needs("matplotlib")
    script = ROOT / "scripts" / "bench" / "methods.py"
    picture = tmp_path / "methods.png"
    command = [sys.executable, str(script), "attackers", "slow-clients", "--seeds=1", f"--picture={picture}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=580, check=False, env=environment())
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [line.strip("| ").split(" | ") for line in done.stdout.splitlines()[2:]]
    means = {row[2]: float(row[4]) for row in rows}
    assert means["mean"] < 0.5 < 0.9 < min(means["trimmed mean"], means["multi-Krum"])
    assert means["FedBuff"] < means["FedAvg"]
    assert picture.read_bytes().startswith(b"\x89PNG")
