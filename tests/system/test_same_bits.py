"""The default experiment, as `scripts/run` runs it, gives the same history and model in every mode and learns."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import needs
from folders import ROOT
from processes import environment

MODULE = (sys.executable, "-m", "torchfedrpc")
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=3", "-m", "torchfedrpc")
# The script uses .venv. Where the suite runs in another environment, that one is to be tested.
HAS_SCRIPT = Path(sys.prefix) == ROOT / ".venv"
SCRIPT = (str(ROOT / "scripts" / "run"),) if HAS_SCRIPT else MODULE
TIMEOUT_S = 400
FAST_S = 60.0
UNLIKE = ("seconds", "bytes_sent", "bytes_received")
Result = tuple[list[dict[str, Any]], dict[str, torch.Tensor]]


def run(folder: Path, *command: str) -> tuple[str, float]:
    """Run a command in a folder; its output and its seconds."""
    needs("sklearn")
    folder.mkdir(exist_ok=True)
    began = time.monotonic()
    done = subprocess.run(
        command,
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
        env={**environment(), "TMPDIR": str(folder)},  # torchrun and torch.optim leave folders there
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout, time.monotonic() - began


def result(outputs: Path) -> Result:
    """The history of a run, without times and traffic, and its final weights."""
    lines = (outputs / "history.jsonl").read_text(encoding="utf-8").splitlines()
    history = [{key: value for key, value in json.loads(line).items() if key not in UNLIKE} for line in lines]
    return history, torch.load(outputs / "model.pt", weights_only=True)


def check_equal(outputs: Path, expected: Result) -> None:
    history, weights = result(outputs)
    assert history == expected[0]
    assert weights.keys() == expected[1].keys()
    for name, tensor in expected[1].items():
        assert torch.equal(weights[name], tensor), name


def check_all_modes_agree(folder: Path, num_workers: Sequence[int], expected: Result, *overrides: str) -> None:
    """Compare pseudo mode with these numbers of workers, a job of a sweep each, and a launch with a local run."""
    workers = f"runtime.num_processes={','.join(map(str, num_workers))}"
    run(folder, *MODULE, "-m", "runtime=pseudo", workers, f"hydra.sweep.dir={folder / 'pseudo'}", *overrides)
    for job, number in enumerate(num_workers):
        config = yaml.safe_load((folder / "pseudo" / str(job) / "config.yaml").read_text())
        assert config["runtime"]["num_processes"] == number
        check_equal(folder / "pseudo" / str(job), expected)
    run(folder, *TORCHRUN, f"hydra.run.dir={folder / 'launch'}", *overrides)
    check_equal(folder / "launch", expected)


@pytest.fixture(scope="module")
def three_rounds(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Three rounds in local mode: the output folder, and what was printed."""
    folder = tmp_path_factory.mktemp("default")
    output, _ = run(folder, *SCRIPT, "runtime=local", "trainer.num_rounds=3", f"hydra.run.dir={folder / 'local'}")
    return folder / "local", output


@pytest.mark.timeout(TIMEOUT_S + 20)
def test_scripts_run_trains_the_default_experiment(three_rounds: tuple[Path, str]) -> None:
    needs("matplotlib")
    if not HAS_SCRIPT:
        pytest.skip(f"scripts/run uses {ROOT / '.venv'}, the suite runs in {sys.prefix}")
    outputs, output = three_rounds
    history, weights = result(outputs)
    assert [record["round"] for record in history] == [0, 1, 2]
    assert [record["num_clients"] for record in history] == [10, 10, 10]
    assert history[-1]["test_accuracy"] > 0.8
    assert sum(tensor.numel() for tensor in weights.values()) == 6090
    config = yaml.safe_load((outputs / "config.yaml").read_text())
    targets = [config[group]["_target_"].rpartition(".")[2] for group in ("dataset", "partition", "model", "trainer")]
    assert targets == ["digits", "dirichlet", "ConvNet", "FedAvgTrainer"]
    (baseline,) = [line for line in output.splitlines() if line.startswith("centralised baseline: test accuracy ")]
    assert float(baseline.rpartition(" ")[2]) > 0.9
    picture = (outputs / "metrics.png").read_bytes()
    assert picture.startswith(b"\x89PNG")
    assert len(picture) > 10_000
    assert output.splitlines()[-1] == f"outputs: {outputs}"


@pytest.mark.timeout(2 * TIMEOUT_S + 20)
def test_three_rounds_agree_across_modes_and_workers(tmp_path: Path, three_rounds: tuple[Path, str]) -> None:
    history, weights = expected = result(three_rounds[0])
    assert len(history) == 3
    assert weights
    # The launch has two workers.
    check_all_modes_agree(tmp_path, (1, 3), expected, "trainer.num_rounds=3", "baseline=null")


@pytest.mark.slow
@pytest.mark.timeout(4 * TIMEOUT_S)
def test_the_default_experiment_learns_within_a_minute_and_agrees_across_modes(tmp_path: Path) -> None:
    for mode in ("local", "pseudo"):
        _, seconds = run(tmp_path, *SCRIPT, f"runtime={mode}", f"hydra.run.dir={tmp_path / mode}")
        assert seconds < FAST_S, mode
    expected = result(tmp_path / "local")
    assert len(expected[0]) == 20
    assert expected[0][-1]["test_accuracy"] >= 0.93
    assert (tmp_path / "local" / "metrics.png").stat().st_size > 10_000
    check_equal(tmp_path / "pseudo", expected)
    check_all_modes_agree(tmp_path / "more", (1, 2, 3), expected, "baseline=null")
