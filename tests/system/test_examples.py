"""The examples run in every mode and print the same, but for the mode's name."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import needs
from folders import ROOT
from processes import Process, environment
from workers import joining, make_token

EXAMPLES = ROOT / "examples"
NAMES = ["custom_trainer", "distillation", "fedbn", "fedbuff"]
NAMES += ["private", "quickstart", "robust", "scaffold", "split_learning"]
IN_ALL_MODES = [EXAMPLES / f"{name}.py" for name in NAMES]
ELASTIC = EXAMPLES / "elastic.py"


def output_of(folder: Path, *command: str) -> str:
    variables = {**environment(), "TMPDIR": str(folder)}  # torchrun and torch.optim leave folders there
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False, env=variables)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_no_example_is_forgotten_here() -> None:
    assert sorted(EXAMPLES.glob("*.py")) == sorted([*IN_ALL_MODES, ELASTIC])


@pytest.mark.parametrize("script", IN_ALL_MODES, ids=lambda path: path.stem)
def test_an_example_prints_the_same_in_every_mode(script: Path, tmp_path: Path) -> None:
    if script.stem == "private":
        needs("dp_accounting")
    local = output_of(tmp_path, sys.executable, str(script), "local")
    pseudo = output_of(tmp_path, sys.executable, str(script), "pseudo")
    launch = ("-m", "torch.distributed.run", "--nproc-per-node=3")
    distributed = output_of(tmp_path, sys.executable, *launch, str(script))
    assert local.startswith("local: ")
    assert pseudo == local.replace("local: ", "pseudo: ")
    assert distributed == local.replace("local: ", "distributed: ")


def driving(folder: Path, *arguments: str) -> Process:
    """The elastic example, of which a folder has a copy."""
    return Process(sys.executable, ELASTIC.name, *arguments, folder=folder)


def count_rounds(driver: Process) -> int:
    """The rounds that a driver has printed."""
    return sum(line.startswith("round ") for line in driver.lines)


def test_elastic_example_has_the_same_result_though_workers_join_leave_and_die(tmp_path: Path) -> None:
    shutil.copy(ELASTIC, tmp_path)
    token = make_token(tmp_path)
    with driving(tmp_path, "disturbed", "127.0.0.1:0") as driver:
        address = driver.next_line("waiting for a worker").split()[-3]
        with joining(address, token, folder=tmp_path) as leaving, joining(address, token, folder=tmp_path) as staying:
            driver.next_line("worker2")
            driver.next_line("round ")
            leaving.signal(signal.SIGTERM)
            driver.next_line(" has left")
            assert leaving.ended() == 0
            driver.next_line("round ")
            driver.signal(signal.SIGKILL)
            driver.ended()
            num_rounds = count_rounds(driver) + 5
            assert staying.ended() == 1
    rounds = f"--rounds={num_rounds}"
    with driving(tmp_path, "undisturbed", rounds) as alone:
        with driving(tmp_path, "disturbed", "127.0.0.1:0", rounds) as driver:
            address = driver.next_line("waiting for a worker").split()[-3]
            with joining(address, token, folder=tmp_path):
                last = driver.next_line("loss after")
                assert driver.ended() == 0
                assert count_rounds(driver) < num_rounds
        assert alone.next_line("loss after") == last
        assert alone.ended() == 0
        assert count_rounds(alone) == num_rounds


def test_the_readme_says_what_cannot_be_guarded_and_what_to_do() -> None:
    readme = (EXAMPLES.parent / "README.md").read_text(encoding="utf-8")
    security = " ".join(readme.split("\n## Security\n", 1)[1].split("\n## ", 1)[0].split())
    for words in ("can run torch's builtin operators", "listens on loopback only", "interface=wg0", "same token"):
        assert words in security
