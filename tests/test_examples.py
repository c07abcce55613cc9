"""The examples run in every mode and print the same, but for the mode's name."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"


def output_of(folder: Path, *command: str) -> str:
    environment = {**os.environ, "TMPDIR": str(folder)}  # torchrun and torch.optim leave folders there
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize("script", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.stem)
def test_an_example_prints_the_same_in_every_mode(script: Path, tmp_path: Path) -> None:
    local = output_of(tmp_path, sys.executable, str(script), "local")
    pseudo = output_of(tmp_path, sys.executable, str(script), "pseudo")
    launch = ("-m", "torch.distributed.run", "--nproc-per-node=3")
    distributed = output_of(tmp_path, sys.executable, *launch, str(script))
    assert local.startswith("local: ")
    assert pseudo == local.replace("local: ", "pseudo: ", 1)
    assert distributed == local.replace("local: ", "distributed: ", 1)


def test_the_readmes_learner_and_trainer_run() -> None:
    readme = (EXAMPLES.parent / "README.md").read_text(encoding="utf-8")
    code = readme.split("```python\n", 1)[1].split("```", 1)[0]
    done = subprocess.run([sys.executable, "-"], input=code, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("local tensor([")
