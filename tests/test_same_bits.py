"""The bundled experiment gives the same history and the same model in every mode, on any number of workers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

TIMEOUT_S = 240
UNLIKE = ("seconds", "bytes_sent", "bytes_received")


def run(folder: Path, *command: str) -> tuple[list[dict[str, Any]], dict[str, torch.Tensor]]:
    """Run the experiment by a command; gives its history (less times and traffic) and its final weights."""
    done = subprocess.run(
        [*command, f"hydra.run.dir={folder}"],
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
        env={**os.environ, "TMPDIR": str(folder.parent)},  # torchrun and torch.optim leave folders there
    )
    assert done.returncode == 0, done.stdout + done.stderr
    lines = (folder / "history.jsonl").read_text(encoding="utf-8").splitlines()
    history = [{key: value for key, value in json.loads(line).items() if key not in UNLIKE} for line in lines]
    return history, torch.load(folder / "model.pt", weights_only=True)


def runs(folder: Path, *overrides: str, counts: tuple[int, ...]) -> None:
    """Compare the other modes, pseudo with these numbers of workers, with local mode."""
    module = (sys.executable, "-m", "torchfedrpc")
    launch = (sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=3", "-m", "torchfedrpc")
    history, weights = run(folder / "local", *module, "runtime=local", *overrides)
    others = {
        f"pseudo{count}": (*module, "runtime=pseudo", f"runtime.num_processes={count}", *overrides)
        for count in counts
    }
    others["torchrun"] = (*launch, *overrides)
    for name, command in others.items():
        other_history, other_weights = run(folder / name, *command)
        assert other_history == history, name
        assert all(torch.equal(weights[entry], other_weights[entry]) for entry in weights), name


def test_three_rounds_agree_across_modes_and_workers(tmp_path: Path) -> None:
    runs(
        tmp_path,
        "dataset=synthetic",
        "dataset.num_samples=600",
        "trainer.num_rounds=3",
        "trainer.local_epochs=2",
        "trainer.clients_per_round=7",
        "baseline=null",
        counts=(2,),
    )


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_main_job_agrees_across_modes_and_workers_and_learns(tmp_path: Path) -> None:
    runs(tmp_path, counts=(1, 2, 3))
    lines = (tmp_path / "local" / "history.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(lines) == 20
    assert json.loads(lines[-1])["test_accuracy"] >= 0.93
    assert (tmp_path / "local" / "metrics.png").stat().st_size > 10_000
