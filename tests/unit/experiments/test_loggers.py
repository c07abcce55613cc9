"""Loggers: what they write, read back by each tool's reader: finished, failed and resumed runs."""

from __future__ import annotations

import asyncio
import json
import math
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import logged_runs
import pytest
from conftest import needs
from logged_runs import LOSSES, TOOLS, Counter, Log, Trainer, logs_of, read_csv, read_json_lines, train
from processes import environment

import torchfedrpc as tfr
from torchfedrpc.experiments import extras
from torchfedrpc.experiments.loggers import (
    CsvLogger,
    JsonLinesLogger,
    MlflowLogger,
    RunLogger,
    TensorBoardLogger,
    WandbLogger,
)

HEAVY = ("mlflow", "wandb")

pytestmark = pytest.mark.timeout(300)  # MLflow takes long to make its database


@pytest.fixture(scope="module", params=TOOLS)
def logs(request: pytest.FixtureRequest, runner: asyncio.Runner, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The name of a tool, and what it has of runs."""
    name = request.param
    if not extras.available(TOOLS[name].package):  # wandb leaves files behind when it is imported
        needs(TOOLS[name].package)
    folder = tmp_path_factory.mktemp(name)
    if name not in HEAVY:
        return name, runner.run(logs_of(name, folder))
    command = [sys.executable, logged_runs.__file__, name, str(folder)]
    env = {**environment(), "MLFLOW_DISABLE_TELEMETRY": "true", "WANDB__SERVICE_WAIT": "240", "TMPDIR": str(folder)}
    done = subprocess.run(command, env=env, stdout=subprocess.PIPE, text=True)
    assert done.returncode == 0
    found = json.loads(done.stdout.splitlines()[-1])
    return name, {scenario: [Log(**log) for log in logs] for scenario, logs in found.items()}


def rounds(num_rounds: int) -> dict[str, float]:
    return {str(round_num): LOSSES[round_num] for round_num in range(num_rounds)}


def check_settings(name: str, log: Log) -> None:
    if TOOLS[name].keeps_settings:
        assert float(log.settings["num_rounds"]) == 4
        assert str(log.settings["model.layers"]) == "[3, 4]"
        assert float(log.settings["setting_119"]) == 119


def test_finished_run_has_settings_metrics_by_round_files_and_status(logs: Any) -> None:
    name, found = logs
    (log,) = found["finished"]
    assert log.losses == rounds(4)
    assert log.extra == {"2": 0.25, "3": 0.25}
    check_settings(name, log)
    assert (log.status, log.reason) == (TOOLS[name].statuses[0], "")
    assert log.files == (["best.pt", "model.pt"] if TOOLS[name].keeps_files else [])


def test_failed_run_is_marked_and_goes_on_in_the_same_run_of_the_tool(logs: Any) -> None:
    name, found = logs
    failed, log = found["failed"]
    assert failed.losses == rounds(3)
    if TOOLS[name].statuses[1]:
        assert (failed.status, failed.reason) == (TOOLS[name].statuses[1], "BrokenError: out of memory")
    assert log.losses == rounds(4)
    assert log.status == TOOLS[name].statuses[0]
    check_settings(name, log)


def test_setting_that_grows_in_a_resumed_run_is_logged(logs: Any) -> None:
    name, found = logs
    (log,) = found["grown"]
    assert log.losses == rounds(4)
    if name == "mlflow":  # which keeps a parameter as it is
        assert (log.settings["num_rounds"], log.settings["resumed.num_rounds"]) == ("2", "4")
    elif TOOLS[name].keeps_settings and name != "tensorboard":  # which shows the first settings
        assert log.settings["num_rounds"] == 4


async def test_stop_is_told_to_the_tool(tmp_path: Path) -> None:
    stopping = tfr.EarlyStopping("extra", mode="max", patience=1)
    stopping._watched._is_known = True  # the first rounds do not have it
    await train(tmp_path, stopping, JsonLinesLogger())
    log = read_json_lines(tmp_path)
    assert log.status == "finished"
    assert log.reason == "extra has not improved for a round; the best was 0.25 in round 3"


async def test_rounds_that_could_not_be_written_are_written_later(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Away(tfr.Callback):
        def on_round_end(self, run: tfr.Run, ended: tfr.RoundEnded) -> None:
            path = tmp_path / "metrics.csv"
            if ended.round_num == 0:
                path.rename(tmp_path / "away")
                path.mkdir()
            if ended.round_num == 2:
                path.rmdir()
                (tmp_path / "away").rename(path)

    await train(tmp_path, CsvLogger(), Away())
    assert read_csv(tmp_path).losses == rounds(4)
    assert "the callback CsvLogger.on_round_end failed, and the run goes on" in caplog.text
    assert "the callback CsvLogger.on_round_end failed 2 times in this run" in caplog.text


async def test_rounds_that_are_never_written_are_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    class Full(CsvLogger):
        def write(self, round_num: int, metrics: Mapping[str, float]) -> None:
            raise OSError("disk full")

    await train(tmp_path, Full())
    assert "4 rounds are not logged; history.jsonl has them" in caplog.text


async def test_unwritten_rounds_are_in_the_checkpoint(tmp_path: Path) -> None:
    class Full(CsvLogger):
        def write(self, round_num: int, metrics: Mapping[str, float]) -> None:
            raise OSError("disk full")

    Full.__name__ = "CsvLogger"
    await train(tmp_path, Full(), num_rounds=2)
    await train(tmp_path, CsvLogger())
    assert read_csv(tmp_path).losses == rounds(4)


async def test_json_lines_have_events_of_workers_and_no_nan(tmp_path: Path) -> None:
    class Publisher(tfr.Callback):
        def on_round_end(self, run: tfr.Run, ended: tfr.RoundEnded) -> None:
            run.proxy.publish(tfr.WorkerLost("worker1", "killed"))

    LOSSES[0], before = math.nan, LOSSES[0]
    try:
        await train(tmp_path, JsonLinesLogger(), Publisher(), num_rounds=1)
    finally:
        LOSSES[0] = before
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["kind"] for line in lines] == ["settings", "round", "loss", "end"]
    assert lines[1]["loss"] is None
    assert (lines[2]["worker"], lines[2]["reason"]) == ("worker1", "killed")


@pytest.mark.parametrize(
    ("make", "command"),
    [
        (
            TensorBoardLogger,
            "logger=tensorboard needs tensorboard, which is not installed: "
            r"pip install 'torchfedrpc\[experiments\]'",
        ),
        (MlflowLogger, r"logger=mlflow needs mlflow, which is not installed: pip install 'torchfedrpc\[mlflow\]'"),
        (WandbLogger, r"logger=wandb needs wandb, which is not installed: pip install 'torchfedrpc\[wandb\]'"),
    ],
)
def test_missing_package_is_named_with_its_install_command(
    make: Callable[[], RunLogger], command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(extras, "available", lambda module: False)
    with pytest.raises(tfr.ConfigError, match=command):
        make()


async def test_logger_without_a_folder_is_refused(tmp_path: Path) -> None:
    async with tfr.LearnerProxy(Counter, ["a"], runtime="local") as proxy:
        trainer = Trainer({"num_rounds": 1}, proxy)
        trainer.callbacks = [CsvLogger()]
        with pytest.raises(tfr.ConfigError, match=r"CsvLogger has no folder: give it path=..., or set"):
            await trainer.train()
        trainer.callbacks = [CsvLogger(tmp_path / "deep" / "rounds.csv")]
        await trainer.train()
    assert (
        (tmp_path / "deep" / "rounds.csv").read_text().startswith("round,loss,seconds,bytes_sent,bytes_received\n0,")
    )


async def test_json_lines_have_no_nan_in_settings(tmp_path: Path) -> None:
    await train(tmp_path, JsonLinesLogger(), num_rounds=1, config={"limit": math.inf})
    first = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[0], parse_constant=pytest.fail)
    assert first["settings"]["limit"] is None


async def test_metric_that_is_no_number_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    LOSSES[0], before = "low", LOSSES[0]  # type: ignore[call-overload]
    try:
        await train(tmp_path, CsvLogger(), num_rounds=1)
    finally:
        LOSSES[0] = before
    assert "could not convert string to float: 'low'" in caplog.text
