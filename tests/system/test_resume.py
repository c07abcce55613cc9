"""A command that is ended at any moment, and given again, ends as one that nothing has disturbed."""

from __future__ import annotations

import asyncio
import io
import json
import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_module
from processes import Process, children_of, descendants_of, wait_for_end

from torchfedrpc.experiments import cli, extras  # noqa: F401 - cli registers the schema of the runtime
from torchfedrpc.experiments.experiment import run_experiment
from torchfedrpc.experiments.experiment_config import ExperimentConfig
from torchfedrpc.experiments.run_folder import plain
from torchfedrpc.federation.checkpoint_store import CheckpointStore

JOB = ("experiment=smoke", "trainer.num_rounds=10", "trainer.local_epochs=20")
MODULE = (sys.executable, "-m", "torchfedrpc")
TORCHRUN = (
    sys.executable,
    "-B",
    "-m",
    "torch.distributed.run",
    "--standalone",
    "--nproc-per-node=3",
    "--max-restarts=3",
)
Result = tuple[list[dict[str, Any]], dict[str, torch.Tensor]]


def result(folder: Path) -> Result:
    """The history of a run, less times and bytes, which depend on who had which learners, and its final weights."""
    records = [json.loads(line) for line in (folder / "history.jsonl").read_text().splitlines()]
    unlike = ("seconds", "bytes_sent", "bytes_received")
    history = [{key: value for key, value in record.items() if key not in unlike} for record in records]
    return history, torch.load(folder / "model.pt", weights_only=True)


def assert_equal(one: Result, other: Result) -> None:
    assert one[0] == other[0]
    assert one[1].keys() == other[1].keys()
    assert all(torch.equal(one[1][name], other[1][name]) for name in one[1])


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Result:
    """What the job gives in this process, in local mode: the other modes give the same."""
    folder = tmp_path_factory.mktemp("undisturbed")
    with initialize_config_module("torchfedrpc.conf", version_base="1.3"):
        config = ExperimentConfig.of(plain(compose("config", overrides=[*JOB, "baseline=null", "runtime=local"])))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(extras, "available", lambda name: False)  # pictures leave fonts open
        asyncio.run(run_experiment(config, folder, stream=io.StringIO()))
    return result(folder)


class Command:
    """The command of a test's run, which can be given again.

    Args:
        folder: its output folder.
        overrides: of the configuration.
        start: what runs it.
    """

    def __init__(self, folder: Path, *overrides: str, start: Sequence[str] = MODULE) -> None:
        self.folder = folder
        self._command = [*start, *JOB, "baseline=null", "resume=auto", f"hydra.run.dir={folder}", *overrides]
        self.process: Process

    def start(self, *overrides: str) -> None:
        command = [*self._command, *overrides]
        self.process = Process(*command, variables={"TMPDIR": str(self.folder.parent)})

    def wait_for_rounds(self, count: int) -> None:
        history = self.folder / "history.jsonl"
        while not (history.exists() and len(history.read_text().splitlines()) >= count):
            assert self.process.process.poll() is None, self.process.output
            time.sleep(0.01)

    def kill(self) -> None:
        children = descendants_of(self.process.pid)
        self.process.signal(signal.SIGKILL)
        wait_for_end(children, 5.0)
        self.process.close()

    def end(self, *statuses: int) -> str:
        """Wait for its end with one of these exit statuses, 0 unless given; returns its output."""
        assert self.process.ended(timeout_s=100) in (statuses or (0,)), self.process.output
        self.process.close()
        return self.process.output

    def __enter__(self) -> Command:
        return self

    def __exit__(self, *exception: object) -> None:
        self.process.close()


@pytest.mark.parametrize(
    "runtime",
    [pytest.param(("runtime=local",), marks=pytest.mark.slow), ("runtime=pseudo", "runtime.num_processes=2")],
)
def test_a_killed_driver_goes_on_and_no_round_is_there_twice(
    tmp_path: Path, undisturbed: Result, runtime: tuple[str, ...]
) -> None:
    with Command(tmp_path / "run", *runtime) as command:
        command.start()
        command.wait_for_rounds(4)
        command.kill()
        command.start()
        assert "going on after round" in command.end()
    assert_equal(result(tmp_path / "run"), undisturbed)
    assert [record["round"] for record in result(tmp_path / "run")[0]] == list(range(10))


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_the_first_signal_lets_the_round_end_and_saves_it(
    tmp_path: Path, undisturbed: Result, number: signal.Signals
) -> None:
    with Command(tmp_path / "run", "runtime=local", "checkpoint_every=1000") as command:
        command.start()
        command.wait_for_rounds(2)
        began = time.monotonic()
        command.process.signal(number)
        output = command.end(128 + number, -number)
        assert time.monotonic() - began < 5.0
        assert f"interrupted; outputs so far: {tmp_path / 'run'}" in output
        num_done = newest_round(tmp_path / "run" / "checkpoints")
        assert num_done == len((tmp_path / "run" / "history.jsonl").read_text().splitlines()) < 10
        command.start()
        assert f"going on after round {num_done}" in command.end()
    assert_equal(result(tmp_path / "run"), undisturbed)


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 2])
def test_a_launch_that_is_started_again_goes_on_whichever_rank_was_killed(
    tmp_path: Path, undisturbed: Result, rank: int
) -> None:
    with Command(tmp_path / "run", start=(*TORCHRUN, "-m", "torchfedrpc")) as command:
        command.start()
        command.wait_for_rounds(3)  # of which one at least is saved
        os.kill(_rank(command.process.pid, rank), signal.SIGKILL)
        output = command.end()
        assert output.count("[INFO] - going on after round") == 1, output
    assert_equal(result(tmp_path / "run"), undisturbed)


def test_a_second_driver_of_the_folder_and_another_configuration_are_refused(tmp_path: Path) -> None:
    with Command(tmp_path / "run", "runtime=local", "trainer.num_rounds=100000") as command:
        command.start()
        command.wait_for_rounds(1)
        second = Command(tmp_path / "run", "runtime=local")
        second.start()
        output = second.end(1)
        assert f"belong to a run that goes on (process {command.process.pid} on " in output
        command.kill()
        history = (tmp_path / "run" / "history.jsonl").read_text()
        assert history
        second.start("trainer.local_epochs=19", "learner.learning_rate=0.5", "seed=3")
        output = second.end(1)
        for named in ("trainer.local_epochs was 20 and is 19", "learner.learning_rate was", "seed was 0 and is 3"):
            assert named in output
        assert (tmp_path / "run" / "history.jsonl").read_text() == history


def newest_round(folder: Path) -> int:
    """The round of the newest checkpoint in a folder that no run has."""
    store = CheckpointStore(folder)
    try:
        found = store.load()
        assert found is not None
        return found.round_num
    finally:
        store.unlock()


def _rank(launcher: int, rank: int) -> int:
    """The process of a rank, once it is there."""
    mark = f"RANK={rank}".encode()
    deadline = time.monotonic() + 30.0
    while time.monotonic() < deadline:
        for pid in children_of(launcher):
            try:
                if mark in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
                    return pid
            except OSError:
                continue
        time.sleep(0.01)
    raise AssertionError(f"rank {rank} is not there")
