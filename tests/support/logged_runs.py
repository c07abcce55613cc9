"""Runs with a logger, and what the tool's own reader has of them: `python logged_runs.py TOOL FOLDER` prints it.

MLflow and Weights & Biases keep threads and files until their process ends, so tests run them in a child.
"""

from __future__ import annotations

import asyncio
import contextlib
import csv
import json
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from wandb_files import run_of

import torchfedrpc as tfr
from torchfedrpc.experiments.loggers import (
    CsvLogger,
    JsonLinesLogger,
    MlflowLogger,
    RunLogger,
    TensorBoardLogger,
    WandbLogger,
)

LOSSES = [4.0, 2.0, 1.0, 0.5]
MANY = {f"setting_{number}": number for number in range(120)}  # more than MLflow takes in one request


class BrokenError(Exception):
    """What ends a run here."""


class Counter:
    """Counts."""

    def __init__(self, client_id: str) -> None:
        self.count = 0

    def add(self) -> int:
        self.count += 1
        return self.count


class Trainer(tfr.AbstractFederationTrainer):
    """Publishes a loss of each round, and from round 2 on another metric."""

    async def train(self) -> None:
        async for round_num in self.rounds():
            await self.learner_proxy.clients().call("add")
            metrics = {"loss": LOSSES[round_num]} | ({"extra": 0.25} if round_num >= 2 else {})
            self.learner_proxy.publish(tfr.RoundEnded(round_num, self.num_rounds, metrics))


class Crash(tfr.Callback):
    """Fails in a round, after the other callbacks."""

    def __init__(self, round_num: int) -> None:
        self.round_num = round_num

    def on_round_end(self, run: tfr.Run, ended: tfr.RoundEnded) -> None:
        if ended.round_num == self.round_num:
            raise BrokenError("out of memory")


async def train(
    folder: Path, *callbacks: tfr.Callback, every: int = 1, num_rounds: int = 4, config: Mapping[str, Any] = MANY
) -> None:
    """Train with checkpoints; the last callback may end the run."""
    async with tfr.LearnerProxy(Counter, ["a"], runtime="local") as proxy:
        trainer = Trainer({"num_rounds": num_rounds}, proxy)
        trainer.callbacks, trainer.output_dir = list(callbacks), folder
        trainer.checkpoints = tfr.Checkpoints(folder / "checkpoints", every=every, resume="auto")
        async with trainer.running({"num_rounds": num_rounds, "model": {"layers": [3, 4]}, **config}):
            await trainer.train()
            (folder / "model.pt").write_bytes(b"weights")


@dataclass(frozen=True)
class Log:
    """What a tool has of a run: losses and the other metric by round, settings, status, reason, files."""

    losses: dict[str, float]
    extra: dict[str, float]
    settings: Mapping[str, Any]
    status: str
    reason: str
    files: list[str]


def read_tensorboard(folder: Path) -> Log:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.plugins.hparams import api_pb2, plugin_data_pb2

    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()

    def hparams(tag: str) -> Any:
        content = events.SummaryMetadata(f"_hparams_/{tag}").plugin_data.content
        return plugin_data_pb2.HParamsPluginData.FromString(content)

    def scalars(name: str) -> dict[str, float]:
        return {str(event.step): event.value for event in events.Scalars(name)}

    settings = {
        key: value.string_value if value.HasField("string_value") else value.number_value
        for key, value in hparams("session_start_info").session_start_info.hparams.items()
    }
    status = api_pb2.Status.Name(hparams("session_end_info").session_end_info.status)
    texts = events.Tags()["tensors"]
    reason = events.Tensors("end/text_summary")[-1].tensor_proto.string_val[0].decode() if texts else ""
    return Log(
        scalars("loss"),
        scalars("extra") if "extra" in events.Tags()["scalars"] else {},
        settings,
        status,
        reason.rpartition("failed: ")[2],
        [],
    )


def read_mlflow(folder: Path) -> Log:
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{folder.parent}/mlflow.db")
    experiment = client.get_experiment_by_name(folder.name)
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id])

    def history(name: str) -> dict[str, float]:
        points = client.get_metric_history(run.info.run_id, name)
        assert len({point.step for point in points}) == len(points)
        return {str(point.step): point.value for point in points}

    files = [file.path for file in client.list_artifacts(run.info.run_id)]
    reason = run.data.tags.get("end", "")
    resumed = {key: value for key, value in run.data.tags.items() if key.startswith("resumed.")}
    return Log(history("loss"), history("extra"), {**run.data.params, **resumed}, run.info.status, reason, files)


def read_wandb(folder: Path) -> Log:
    runs = [run_of(path) for path in sorted(folder.glob("wandb/offline-run-*/run-*.wandb"))]
    assert len({run["id"] for run in runs}) == 1
    rounds = {step: metrics for run in runs for step, metrics in run["history"].items()}
    last = runs[-1]
    assert last["exit"] == (0 if last["summary"]["status"] == "finished" else 1)
    return Log(
        {str(step): metrics["loss"] for step, metrics in sorted(rounds.items())},
        {str(step): metrics["extra"] for step, metrics in rounds.items() if "extra" in metrics},
        last["config"],
        last["summary"]["status"],
        last["summary"]["reason"],
        last["artifacts"],
    )


def read_csv(folder: Path) -> Log:
    with (folder / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    losses = {row["round"]: float(row["loss"]) for row in rows}
    assert len(losses) == len(rows)
    extra = {row["round"]: float(row["extra"]) for row in rows if row.get("extra")}
    return Log(losses, extra, {}, "", "", [])


def read_json_lines(folder: Path) -> Log:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    rounds = [line for line in lines if line["kind"] == "round"]
    losses = {str(line["round"]): line["loss"] for line in rounds}
    assert len(losses) == len(rounds)
    (*_, settings) = (line["settings"] for line in lines if line["kind"] == "settings")
    extra = {str(line["round"]): line["extra"] for line in rounds if "extra" in line}
    return Log(losses, extra, settings, lines[-1]["status"], lines[-1]["reason"], [])


@dataclass(frozen=True)
class Tool:
    """A tool: its package, how its logger is made, how it is read, and what it keeps."""

    package: str
    make: Callable[[Path], RunLogger]
    read: Callable[[Path], Log]
    statuses: tuple[str, str]
    keeps_settings: bool = True
    keeps_files: bool = False


TOOLS = {
    "tensorboard": Tool(
        "tensorboard", lambda folder: TensorBoardLogger(), read_tensorboard, ("STATUS_SUCCESS", "STATUS_FAILURE")
    ),
    "mlflow": Tool(
        "mlflow",
        lambda folder: MlflowLogger(folder.name, tracking_uri=f"sqlite:///{folder.parent}/mlflow.db"),
        read_mlflow,
        ("FINISHED", "FAILED"),
        keeps_files=True,
    ),
    "wandb": Tool("wandb", lambda folder: WandbLogger(), read_wandb, ("finished", "failed"), keeps_files=True),
    "csv": Tool("csv", lambda folder: CsvLogger(), read_csv, ("", ""), keeps_settings=False),
    "jsonl": Tool("json", lambda folder: JsonLinesLogger(), read_json_lines, ("finished", "failed")),
}


async def finished(tool: Tool, folder: Path) -> list[Log]:
    """A run that ends well."""
    (folder / "best.pt").touch()
    await train(folder, tool.make(folder))
    return [tool.read(folder)]


async def failed(tool: Tool, folder: Path) -> list[Log]:
    """A run that fails in round 2, and goes on after round 1: it repeats round 2, which the tool has."""
    with contextlib.suppress(BrokenError):
        await train(folder, tool.make(folder), Crash(2), every=2)
    before = tool.read(folder)
    await train(folder, tool.make(folder), every=2)
    return [before, tool.read(folder)]


async def grown(tool: Tool, folder: Path) -> list[Log]:
    """A run that is resumed with more rounds."""
    await train(folder, tool.make(folder), num_rounds=2)
    await train(folder, tool.make(folder), num_rounds=4)
    return [tool.read(folder)]


async def logs_of(name: str, folder: Path) -> dict[str, list[Log]]:
    """Return what a tool has of the runs of each of these functions."""
    logs = {}
    for scenario in (finished, failed, grown):
        (inner := folder / scenario.__name__).mkdir()
        logs[scenario.__name__] = await scenario(TOOLS[name], inner)
    return logs


if __name__ == "__main__":
    os.chdir(sys.argv[2])  # MLflow puts artifacts into the working directory
    logs = asyncio.run(logs_of(sys.argv[1], Path(sys.argv[2])))
    print(json.dumps({name: list(map(asdict, found)) for name, found in logs.items()}))
