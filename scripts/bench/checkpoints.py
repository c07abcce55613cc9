"""The cost of checkpoints: time added to the rounds beside a save, bytes on disk, the driver's memory, a resume.

Learners live in two worker processes. Each run has its own process, since its peak memory is measured. A save goes on
beside the rounds that follow it. What it adds to them is the time from its round's end to that of the next round that
is saved, less as many rounds that had no save beside them, in the same run. Printed are medians and means, and in
brackets the least and the most. The last line is of evicted learners: 1,000 snapshots in the temporary store.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

import torchfedrpc as tfr
from torchfedrpc.storage import BlobStore


@dataclass(frozen=True)
class Plan:
    """One run.

    Attributes:
        num_learners: how many there are.
        num_floats: float32 numbers that each of them keeps.
        num_called: learners that a round calls, the same ones until a save; the first round calls all.
        num_rounds: rounds, those before a resume among them.
        every: rounds from one save to the next.
        saves: whether they are saved at all.
    """

    num_learners: int
    num_floats: int
    num_called: int
    num_rounds: int
    every: int
    saves: bool = True


class BenchLearner:
    """Has a state that each call changes as a whole."""

    def __init__(self, client_id: str, num_floats: int) -> None:
        self.weights = torch.rand(num_floats)

    def step(self) -> float:
        """Some work, whose result depends on all that was done before."""
        for _ in range(4):
            self.weights = torch.sin(3 * self.weights)
        return float(self.weights.sum())


class BenchTrainer(tfr.AbstractFederationTrainer):
    """Calls learners, and notes when.

    Attributes:
        log: all results.
        began: when its first round began, by the clock.
        ends: when its rounds ended.
    """

    not_state = tfr.AbstractFederationTrainer.not_state | {"began", "ends"}

    def __init__(self, config: dict[str, Any], proxy: tfr.LearnerProxy) -> None:
        super().__init__(config, proxy)
        self.log: list[float] = []
        self.began = 0.0
        self.ends: list[float] = []

    async def train(self) -> None:
        """Run."""
        everyone = self.learner_proxy.client_ids
        stride = len(everyone) // self.config.num_called  # for both workers to have some
        async for round_num in self.rounds():
            self.began = self.began or time.perf_counter()
            first = round_num // self.config.every % stride
            chosen = everyone[first::stride][: self.config.num_called] if round_num else everyone
            self.log += (await self.learner_proxy.clients(chosen).call("step")).values()
            self.ends.append(time.perf_counter())


async def run(plan: Plan, folder: Path) -> dict[str, Any]:
    """Make a run, from the checkpoint in the folder if there is one."""
    saves: list[dict[str, Any]] = []

    def note(event: tfr.Event) -> None:
        if isinstance(event, tfr.CheckpointSaved):
            disk_bytes = (folder / "checkpoints.sqlite").stat().st_size
            saves.append({**asdict(event), "at": time.perf_counter(), "disk_bytes": disk_bytes})

    clients = {f"client_{number}": {"num_floats": plan.num_floats} for number in range(plan.num_learners)}
    runtime = {"execution_mode": "pseudo", "num_processes": 2}
    async with tfr.LearnerProxy(BenchLearner, clients, runtime=runtime) as proxy:
        proxy.subscribe(note)
        config = {"num_rounds": plan.num_rounds, "num_called": plan.num_called, "every": plan.every}
        trainer = BenchTrainer(config, proxy)
        if plan.saves:
            trainer.checkpoints = tfr.Checkpoints(folder, every=plan.every, resume="auto")
        began = time.perf_counter()
        await trainer.train()
    start_s = trainer.began - began
    return {"log": trainer.log, "start_s": start_s, "ends": trainer.ends, "saves": saves, "peak_bytes": peak_bytes()}


def measured(plan: Plan, folder: Path) -> dict[str, Any]:
    """The same in a process of its own."""
    command = [sys.executable, __file__, "--run", json.dumps(asdict(plan)), str(folder)]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True)
    return dict(json.loads(done.stdout))


def peak_bytes() -> int:
    """The most memory that this process has had."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return next(1024 * int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM:"))


def rounds_and_costs(result: dict[str, Any]) -> tuple[list[float], list[float]]:
    """Seconds of the rounds without a save beside them, and what each save added to those that it was beside."""
    ends, saves = result["ends"], result["saves"][1:]  # the first is of all learners in any case
    lasted = [later - earlier for earlier, later in itertools.pairwise([0.0, *ends])]
    clean: list[float] = []
    cycles: list[list[float]] = []
    for save, following in itertools.pairwise(saves):
        numbers = range(save["round_num"] + 1, following["round_num"] + 1)
        cycles.append([lasted[number] for number in numbers])
        clean += [lasted[number] for number in numbers if ends[number - 1] > save["at"]]
    usual = statistics.median(clean)
    return clean, [sum(cycle) - len(cycle) * usual for cycle in cycles]


def written_s(folder: Path, num_bytes: int) -> float:
    """Seconds to write so many bytes to a file, and to see them on the disk."""
    piece = os.urandom(4_000_000)
    began = time.perf_counter()
    with (folder / "raw").open("wb", buffering=0) as file:
        for _ in range(num_bytes // len(piece)):
            file.write(piece)
        os.fsync(file.fileno())
    return time.perf_counter() - began


def spread(values: list[float]) -> str:
    """Median, mean and range of seconds."""
    median, mean = statistics.median(values), statistics.fmean(values)
    return f"{median:.3f} s, mean {mean:.3f} s ({min(values):.3f} to {max(values):.3f})"


def in_mb(num_bytes: float) -> str:
    """A size as text."""
    return f"{num_bytes / 1e6:.1f} MB"


def column(plan: Plan, folder: Path, plain: dict[str, Any]) -> dict[str, str]:
    """A run with saves, beside the same without."""
    saving = measured(plan, folder)
    assert saving["log"] == plain["log"], "saving has changed the results"
    clean, costs = rounds_and_costs(saving)
    saves = saving["saves"][1:-1]  # the last had no round beside it
    return {
        "learners that a round calls": f"{plan.num_called}",
        "a round that no save is beside": spread(clean),
        "what a save adds to the rounds": spread(costs),
        "the save itself, beside the rounds": spread([save["seconds"] for save in saves]),
        "its snapshots": in_mb(statistics.median(save["num_bytes"] for save in saves)),
        "the file with three checkpoints": in_mb(saves[-1]["disk_bytes"]),
        "driver's peak memory, no saves": in_mb(plain["peak_bytes"]),
        "driver's peak memory, with saves": in_mb(saving["peak_bytes"]),
    }


def resumed(plan: Plan, folder: Path, plain: dict[str, Any]) -> dict[str, str]:
    """A first round and its save, which is beside nothing, and a resume from it."""
    first, second = (measured(replace(plan, num_rounds=number, every=1), folder) for number in (1, 2))
    assert second["log"] == plain["log"][: len(second["log"])], "a resumed run has other results"
    (save,) = first["saves"]
    return {
        "a first save, of all, beside nothing": f"{save['seconds']:.3f} s, {in_mb(save['disk_bytes'])} on disk",
        "as many bytes written to one file": f"{written_s(folder, save['disk_bytes']):.3f} s",
        "a resume, up to its first round": f"{second['start_s']:.3f} s",
    }


def evicted(num_learners: int = 1000, num_bytes: int = 200_000) -> dict[str, str]:
    """Snapshots of evicted learners, written and read."""
    data, seconds = os.urandom(num_bytes), []
    with closing(BlobStore()) as store:
        for _ in range(2):  # the second time in place of the first
            began = time.perf_counter()
            for number in range(num_learners):
                store.put(f"client_{number}", [data])
            written = time.perf_counter()
            for number in range(num_learners):
                assert len(store.get(f"client_{number}")) == num_bytes
            seconds.append((written - began, time.perf_counter() - written))
    return {"1,000 evicted learners of 200 kB": "; ".join(f"{a:.2f} s written, {b:.2f} s read" for a, b in seconds)}


def main() -> None:
    """Measure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="half a minute instead of two: 20 learners of 1 MB")
    parser.add_argument("--run", nargs=2, metavar=("PLAN", "FOLDER"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.run is not None:
        print(json.dumps(tfr.run(run, Plan(**json.loads(options.run[0])), Path(options.run[1]))))
        return
    num_learners, num_floats, num_saves = (20, 250_000, 5) if options.quick else (100, 1_000_000, 12)
    all_called = Plan(num_learners, num_floats, num_learners, num_rounds=10 * num_saves, every=10)
    three_called = replace(all_called, num_called=3, num_rounds=20 * num_saves, every=20)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        print(
            f"torch {torch.__version__}, Python {platform.python_version()}, {os.cpu_count()} cores; {num_learners} "
            f"learners of {4 * num_floats / 1e6:g} MB in 2 workers"
        )
        plains = [measured(replace(plan, saves=False), folder) for plan in (all_called, three_called)]
        columns = [
            column(plan, folder / f"{plan.num_called}", plain)
            for plan, plain in zip((all_called, three_called), plains, strict=True)
        ]
        for label, text in columns[0].items():
            print(f"{label:38}{text:30}{columns[1][label]}")
        for label, text in (resumed(all_called, folder / "resumed", plains[0]) | evicted()).items():
            print(f"{label:38}{text}")


if __name__ == "__main__":
    main()
