"""The cost of learners' state in torchfedrpc: of many clients, of snapshots and their comparison, of checkpoints.

- ``many``, ``many_two``: a round of 1,000 of 100,000 clients, of which 100 stay in memory, in this process or in two
  workers. Memory is that of the driver and its workers, after each round.
- ``proven-NAME``, ``unproven-NAME``: a snapshot with and without its comparison with the live learner.
- ``saved-N``, ``unsaved-N``: a round that calls N of 100 learners of 4 MB, on two workers, with and without a
  checkpoint every ten rounds; a save goes on beside the rounds that follow it.
- ``evicted``: snapshots of 1,000 evicted learners written to the temporary store and read.
"""

from __future__ import annotations

import contextlib
import gc
import os
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from protocol import Measured, Repeat, serve
from torch import nn
from torchfedrpc_contender import own_memory_mb

import torchfedrpc as tfr
from torchfedrpc.host import snapshot
from torchfedrpc.storage import BlobStore
from torchfedrpc.wire.allowlist import AllowList

# Many clients.

NUM_CLIENTS = 100_000
NUM_SELECTED = 1000
NUM_RESIDENT = 100


class CountingLearner:
    """A client with 1,000 numbers."""

    def __init__(self, client_id: str) -> None:
        self.state = torch.zeros(1000)

    def step(self, by: float) -> float:
        """Add to all of them."""
        self.state += by
        return float(self.state.sum())


@asynccontextmanager
async def many_clients(mode: str) -> AsyncIterator[Repeat]:
    """Rounds. Of the time to open, with workers, that of a proxy of two clients is taken off: they start."""
    runtime = {"execution_mode": mode, "num_processes": 2, "max_resident_learners": NUM_RESIDENT}
    began = time.perf_counter()
    if mode == "pseudo":
        async with tfr.LearnerProxy(CountingLearner, ["a", "b"], runtime=runtime):
            pass
    few_s = time.perf_counter() - began
    client_ids = [f"client_{number}" for number in range(NUM_CLIENTS)]
    began = time.perf_counter()
    async with tfr.LearnerProxy(CountingLearner, client_ids, runtime=runtime) as proxy:
        yield many_rounds(proxy, client_ids, time.perf_counter() - began - few_s)


def many_rounds(proxy: tfr.LearnerProxy, client_ids: list[str], opens_s: float) -> Repeat:
    """Rounds with other clients each time, and few that come again.

    Raises:
        RuntimeError: If a learner returns another result than that of its calls so far.
    """
    random, num_calls = np.random.default_rng(5), Counter[str]()

    async def repeat(count: int) -> Measured:
        seconds, resident_mb = [], []
        for _ in range(count):
            chosen = [client_ids[place] for place in random.choice(NUM_CLIENTS, NUM_SELECTED, replace=False)]
            began = time.perf_counter()
            results = await proxy.clients(chosen).call("step", 1.0)
            seconds.append(time.perf_counter() - began)
            num_calls.update(chosen)
            if any(result != 1000.0 * num_calls[client_id] for client_id, result in results.items()):
                raise RuntimeError("a learner has lost or repeated a call")
            gc.collect()
            resident_mb.append(family_mb())
        settled_mb = resident_mb[min(1, count - 1)]
        growth_percent = 100 * (resident_mb[-1] / settled_mb - 1)
        extra = {"opens_s": opens_s, "resident_mb": settled_mb, "growth_percent": growth_percent}
        return Measured(seconds, "each learner has had all of its calls", extra)

    return repeat


def family_mb() -> float:
    """Memory that this process and all its descendants have now; pages that they share count for each."""
    parents, sizes_mb = {}, {}
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has ended
            lines = (folder / "status").read_text(encoding="utf-8").splitlines()
            fields = dict(line.split(":\t", 1) for line in lines if ":\t" in line)
            parents[int(folder.name)] = int(fields["PPid"])
            sizes_mb[int(folder.name)] = 1.024e-3 * int(fields.get("VmRSS", "0 kB").split()[0])
    family = [os.getpid()]
    for pid in family:  # it grows meanwhile
        family += [child for child, parent in parents.items() if parent == pid]
    return sum(sizes_mb[pid] for pid in family)


# Snapshots.


class Point:
    """A small object."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.weight = number / 3
        self.name = f"point {number}"


class Content:
    """A learner with a content."""

    def __init__(self, content: Any) -> None:
        self.content = content


def layers_and_momentum() -> Any:
    """150 layers, so 300 parameters, with an optimiser that has stepped: 900 tensors in all."""
    model = nn.Sequential(*(nn.Linear(16, 16) for _ in range(150)))
    optimiser = torch.optim.SGD(model.parameters(), lr=1e-6, momentum=0.9)
    model(torch.ones(1, 16)).sum().backward()
    optimiser.step()
    return model, optimiser


CONTENTS: dict[str, Callable[[], Any]] = {
    "layers": layers_and_momentum,
    "tensor": lambda: torch.ones(10_000_000),
    "objects": lambda: [Point(number) for number in range(10_000)],
    "floats": lambda: [number / 3 for number in range(100_000)],
}


def snapshots(content: str, *, proven: bool) -> Repeat:
    """Snapshots of a learner."""
    learner, allow = Content(CONTENTS[content]()), AllowList([__name__])

    def repeat(count: int) -> Measured:
        seconds = []
        with contextlib.ExitStack() as stack:
            if not proven:
                stack.enter_context(mock.patch.object(snapshot, "_difference", return_value=None))
            for _ in range(count):
                began = time.perf_counter()
                taken = snapshot.Snapshot("client_1", "learner", {}, snapshot.capture(learner))
                data = snapshot.dump(taken, allow, learner)
                seconds.append(time.perf_counter() - began)
        return Measured(seconds, f"{len(data)} bytes")

    return repeat


def evictions(count: int, num_learners: int = 1000, num_bytes: int = 200_000) -> Measured:
    """``evicted``; each time in place of the time before.

    Raises:
        RuntimeError: If another snapshot is read than was written.
    """
    data, seconds = os.urandom(num_bytes), []
    with contextlib.closing(BlobStore()) as store:
        for _ in range(count):
            began = time.perf_counter()
            for number in range(num_learners):
                store.put(f"client_{number}", [data])
            written = time.perf_counter()
            read = [bytes(store.get(f"client_{number}")) == data for number in range(num_learners)]
            seconds.append(time.perf_counter() - began)
        if not all(read):
            raise RuntimeError("the store has lost a snapshot")
    return Measured(seconds, "read", {"read_s": began + seconds[-1] - written})


# Checkpoints.

NUM_SAVED_LEARNERS = 100
NUM_FLOATS = 1_000_000
SAVE_EVERY = 10


class ChangingLearner:
    """Has a state that each call changes as a whole."""

    def __init__(self, client_id: str) -> None:
        self.weights = torch.rand(NUM_FLOATS)

    def step(self) -> float:
        """Some work, whose result depends on all that was done before."""
        for _ in range(4):
            self.weights = torch.sin(3 * self.weights)
        return float(self.weights.sum())


class TimingTrainer(tfr.AbstractFederationTrainer):
    """Calls learners, and notes when.

    Attributes:
        log: All results.
        times: When the first round began, and when each ended.
    """

    not_state = tfr.AbstractFederationTrainer.not_state | {"times"}

    def __init__(self, config: dict[str, int], proxy: tfr.LearnerProxy) -> None:
        super().__init__(config, proxy)
        self.log: list[float] = []
        self.times: list[float] = []

    async def train(self) -> None:
        """Call the same learners until a save, then others; the first round calls all."""
        everyone, num_called = self.learner_proxy.client_ids, self.config.num_called
        stride = len(everyone) // num_called  # for both workers to have some
        async for round_num in self.rounds():
            self.times = self.times or [time.perf_counter()]
            first = round_num // SAVE_EVERY % stride
            chosen = everyone[first::stride][:num_called] if round_num else everyone
            self.log += (await self.learner_proxy.clients(chosen).call("step")).values()
            self.times.append(time.perf_counter())


async def train(num_called: int, num_rounds: int, folder: str | None) -> tuple[TimingTrainer, float, list[Any]]:
    """A run, from the checkpoint in the folder if there is one: its trainer, when it began, and its saves."""
    saves: list[Any] = []
    client_ids = [f"client_{number}" for number in range(NUM_SAVED_LEARNERS)]
    runtime = {"execution_mode": "pseudo", "num_processes": 2}
    async with tfr.LearnerProxy(ChangingLearner, client_ids, runtime=runtime) as proxy:
        proxy.subscribe(lambda event: saves.append(event) if isinstance(event, tfr.CheckpointSaved) else None)
        trainer = TimingTrainer({"num_rounds": num_rounds, "num_called": num_called}, proxy)
        if folder is not None:
            trainer.checkpoints = tfr.Checkpoints(folder, every=min(SAVE_EVERY, num_rounds), resume="auto")
        began = time.perf_counter()
        await trainer.train()
    return trainer, began, saves


async def saved_rounds(num_called: int, saves: bool, count: int) -> Measured:
    """Rounds, and then a resume of them if they are saved."""
    with tempfile.TemporaryDirectory() as folder:
        trainer, _, events = await train(num_called, count, folder if saves else None)
        extra = {"peak_mb": own_memory_mb("VmHWM")}
        if saves:
            extra["save_s"] = float(np.median([event.seconds for event in events]))
            extra["saved_mb"] = float(np.median([event.num_bytes for event in events])) / 1e6
            extra["disk_mb"] = (Path(folder) / "checkpoints.sqlite").stat().st_size / 1e6
            resumed, began, _ = await train(num_called, count + 1, folder)
            extra["resume_s"] = resumed.times[0] - began
    return Measured(list(np.diff(trainer.times)), str(hash(tuple(trainer.log))), extra)


@asynccontextmanager
async def prepare(workloads: tuple[str, ...]) -> AsyncIterator[Mapping[str, Repeat]]:
    """All workloads; those of many clients have a process alone."""
    torch.set_num_threads(1)
    async with contextlib.AsyncExitStack() as stack:
        repeats: dict[str, Repeat] = {"evicted": evictions}
        for name in workloads:
            kind, _, argument = name.partition("-")
            if kind in ("many", "many_two"):
                mode = "local" if kind == "many" else "pseudo"
                repeats[name] = await stack.enter_async_context(many_clients(mode))
            elif kind in ("proven", "unproven"):
                repeats[name] = snapshots(argument, proven=kind == "proven")
            elif kind in ("saved", "unsaved"):
                repeats[name] = partial(saved_rounds, int(argument), kind == "saved")
        yield repeats


if __name__ == "__main__":
    serve(prepare, "torchfedrpc", "torch")
