"""The federated run that chaos disturbs: FedAvg over clients of which half keep state, a stream and a reduction."""

from __future__ import annotations

import asyncio
import contextlib
import faulthandler
import hashlib
import os
import random
import signal
import time
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import torchfedrpc as tfr
from torchfedrpc.events import Event, ProgressReported
from torchfedrpc.experiments.data.partition import iid
from torchfedrpc.experiments.data.synthetic import synthetic
from torchfedrpc.experiments.learners.classification import ClassificationLearner
from torchfedrpc.experiments.training import build_model, initial_weights
from torchfedrpc.federation.algorithms.fedavg import FedAvgTrainer
from torchfedrpc.wire.fingerprint import fingerprint

NUM_CLIENTS = 12
COHORT_SIZE = 10
LOCAL_EPOCHS = 16
STREAM_ITEMS = 12
STREAM_METHOD = "own_epochs"
_NUM_SNAPSHOTS = 3
_NUM_BLENDING = 2
_LARGE = 600_000  # float32: large enough for workers to map the shared value, and the driver the results
_OWN_BATCH_SIZE = 64
_DATASET: dict[str, Any] = {"_target_": "torchfedrpc.experiments.data.synthetic.synthetic", "num_samples": 2500}
_MODEL = {"_target_": "torchfedrpc.experiments.models.MLP"}

_TRAPS = "TORCHFEDRPC_CHAOS_TRAPS"  # the folder of traps, in the environment of workers
_STATELESS = "TORCHFEDRPC_CHAOS_STATELESS"  # set if all learners are stateless, in the environment of drivers

faulthandler.register(signal.SIGUSR2)  # if a round hangs, its workers are asked for their stacks

Digests = dict[str, str]  # SHA-256 of each part of the results of a round, or of a run
Disturbed = Callable[["ChaosTrainer", int], AbstractAsyncContextManager[None]]


class Traps(contextlib.AbstractContextManager["Traps"]):
    """Kills worker processes at points of their learners' code, each at most once.

    A trap is a file, so that arming it is no call, which would be made again after the loss. Workers find the folder
    in their environment.

    Args:
        folder: An empty folder.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def __enter__(self) -> Traps:
        os.environ[_TRAPS] = str(self._folder)
        return self

    def __exit__(self, *exception: object) -> None:
        del os.environ[_TRAPS]

    def arm(self, point: str, pid: int) -> None:
        """Let a process be killed when it reaches a point next, ``capture`` or ``restore``."""
        (self._folder / f"{point}.{pid}").touch()

    def disarm(self, point: str, pid: int) -> None:
        """Take a trap back, if it was not sprung."""
        (self._folder / f"{point}.{pid}").unlink(missing_ok=True)

    def spring(self, point: str, pid: int) -> bool:
        """Kill a process, if there is a trap for it at a point. Returns whether there was one."""
        trap = self._folder / f"{point}.{pid}"
        is_armed = trap.exists()
        if is_armed:
            trap.with_name(f"{trap.name}.sprung").write_text(f"{time.monotonic()}\n", encoding="ascii")
            trap.unlink(missing_ok=True)
            os.kill(pid, signal.SIGKILL)
        return is_armed

    def sprung_at(self, point: str, pid: int) -> float | None:
        """When the process was killed there (monotonic, in seconds); None if it was not yet."""
        with contextlib.suppress(FileNotFoundError):
            text = (self._folder / f"{point}.{pid}.sprung").read_text(encoding="ascii")
            return float(text) if text.endswith("\n") else None
        return None

    @staticmethod
    def reach(point: str) -> None:
        """Be killed, if there is a trap for this process at this point."""
        if (folder := os.environ.get(_TRAPS)) is not None:
            Traps(Path(folder)).spring(point, os.getpid())


class Activities:
    """The names of what a run is doing.

    Attributes:
        seconds: Name -> the seconds of each time that it was done.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, list[float]] = defaultdict(list)
        self._counts: Counter[str] = Counter()
        self._changed = asyncio.Event()

    @property
    def names(self) -> list[str]:
        """The activities under way."""
        return sorted(+self._counts)

    @contextmanager
    def doing(self, name: str) -> Iterator[None]:
        """An activity, from beginning to end."""
        began = time.monotonic()
        self._counts[name] += 1
        self._changed.set()
        try:
            yield
        finally:
            self._counts[name] -= 1
            self.seconds[name].append(time.monotonic() - began)

    async def until(self, name: str) -> None:
        """Wait until an activity is under way."""
        while not self._counts[name]:
            self._changed.clear()
            await self._changed.wait()


class TrappedLearner(ClassificationLearner):
    """The bundled learner, with points for traps: its state is captured for a snapshot, an eviction or a move."""

    def state_dict(self) -> dict[str, Any]:
        """Capture the state."""
        Traps.reach("capture")
        return super().state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the state."""
        Traps.reach("restore")
        super().load_state_dict(state)


class StatefulLearner(TrappedLearner):
    """Trains a second model, in which is all that a loss can damage.

    It has an optimiser with momentum that lasts, draws from the three random streams, a count and a history.
    """

    def __init__(self, client_id: str, **settings: Any) -> None:
        super().__init__(client_id, **settings)
        self._own = build_model(settings["model"], settings["seed"])
        self._optimiser = torch.optim.SGD(self._own.parameters(), lr=0.05, momentum=0.9)
        self._losses: list[float] = []
        self._mixture = torch.zeros(_LARGE)

    def blend(self, values: Tensor) -> Tensor:
        """Take half of the values [_LARGE] into its own, in place; returns its own, which it changes later."""
        self._mixture.add_(values).mul_(0.5)
        return self._mixture

    def train_epoch(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Train as the bundled learner, and the second model too."""
        own_loss = self._own_epoch()
        return {**super().train_epoch(*args, **kwargs), "own_loss": own_loss}

    async def evaluate(  # type: ignore[override]  # a learner's methods may be async
        self, model_weights: Mapping[str, Tensor] | None = None
    ) -> dict[str, Any]:
        """Evaluate as the bundled learner, in two steps of the event loop, and with noise."""
        scored = super().evaluate(model_weights)
        await asyncio.sleep(0)
        return {**scored, "noise": random.random(), "num_epochs": len(self._losses)}

    def own_epochs(self, count: int) -> Iterator[dict[str, Any]]:
        """Train the second model, an epoch for each item."""
        for _ in range(count):
            yield {"loss": self._own_epoch(), "weights": self._own.state_dict()}

    def state_dict(self) -> dict[str, Any]:
        """Capture the state of both models."""
        own = {"model": self._own.state_dict(), "optimiser": self._optimiser.state_dict(), "losses": self._losses}
        own["mixture"] = self._mixture
        return {**super().state_dict(), "own": own}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the state of both models."""
        super().load_state_dict(state)
        own = state["own"]
        self._own.load_state_dict(own["model"])
        self._optimiser.load_state_dict(own["optimiser"])
        self._losses, self._mixture = own["losses"], own["mixture"]

    def _own_epoch(self) -> float:
        samples = self._train_set().take(self._indices[torch.randperm(len(self._indices))])
        scale = np.random.uniform(0.1, 0.2) * random.uniform(0.5, 1.0)
        total = 0.0
        for inputs, labels in samples.batches(_OWN_BATCH_SIZE):
            loss = F.cross_entropy(self._own(inputs + scale * torch.randn_like(inputs)), labels)
            self._optimiser.zero_grad()
            loss.backward()
            self._optimiser.step()
            total += loss.item()
            tfr.current_call().report({"loss": loss.item(), "num_epochs": len(self._losses)})
        self._losses.append(total)
        return total


class StatelessLearner(ClassificationLearner):
    """The bundled learner without weights of its own; it draws from the three random streams, and reports."""

    def __init__(self, client_id: str, **settings: Any) -> None:
        super().__init__(client_id, **settings, keep_weights=False)

    def train_epoch(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Train as the bundled learner, and draw."""
        return {**super().train_epoch(*args, **kwargs), "own_loss": self._drawn()}

    async def evaluate(  # type: ignore[override]  # a learner's methods may be async
        self, model_weights: Mapping[str, Tensor] | None = None
    ) -> dict[str, Any]:
        """Evaluate as the bundled learner, in two steps of the event loop, and with noise."""
        scored = super().evaluate(model_weights)
        await asyncio.sleep(0)
        return {**scored, "noise": random.random()}

    def blend(self, values: Tensor) -> Tensor:
        """Return half of the values [_LARGE], which it changes in place."""
        return values.mul_(0.5)

    def own_epochs(self, count: int) -> Iterator[dict[str, Any]]:
        """Draw for each item."""
        for _ in range(count):
            yield {"loss": self._drawn(), "weights": torch.randn(100)}

    def _drawn(self) -> float:
        drawn = np.random.uniform(0.1, 0.2) * random.uniform(0.5, 1.0) + float(torch.randn(()))
        tfr.current_call().report({"loss": drawn})
        return drawn


def are_stateless() -> bool:
    """Whether all learners of the run are stateless."""
    return _STATELESS in os.environ


def make_all_stateless() -> None:
    """Let all learners of runs from now on be stateless, in processes that this one starts too."""
    os.environ[_STATELESS] = "1"


def make_stateless_learner(client_id: str, **settings: Any) -> ClassificationLearner:
    """The learner of each client, if all are stateless."""
    return StatelessLearner(client_id, **settings)


make_stateless_learner.stateless = True  # type: ignore[attr-defined]


def make_learner(client_id: str, **settings: Any) -> ClassificationLearner:
    """The bundled learner for odd clients, a stateful one for even ones."""
    kind = TrappedLearner if _number(client_id) % 2 else StatefulLearner
    return kind(client_id, **settings)


class ChaosTrainer(FedAvgTrainer):
    """The bundled FedAvg, and in each round a stream, an evaluation, and some learners set back a little.

    Args:
        proxy: An open proxy of `make_learner`.
        num_rounds: How many rounds there are.
        disturbed: A context manager around each round.

    Attributes:
        digests: For each finished round, hashes of all results of its calls.
        activities: The steps of the round that are under way.
    """

    not_state: ClassVar[frozenset[str]] = FedAvgTrainer.not_state | {"_disturbed", "_updates", "activities"}

    def __init__(self, proxy: tfr.LearnerProxy, num_rounds: int, disturbed: Disturbed) -> None:
        config = {"num_rounds": num_rounds, "clients_per_round": COHORT_SIZE, "local_epochs": LOCAL_EPOCHS}
        super().__init__(config, proxy, initial_weights=initial_weights(_MODEL, seed=0))
        self.digests: list[Digests] = []
        self.activities = Activities()
        self._disturbed = disturbed
        self._updates: Any = None
        self._snapshots: dict[str, bytes] = {}
        self._reports: dict[str, list[Any]] = {}
        proxy.subscribe(self._note)

    def streaming(self, round_num: int) -> str:
        """The client whose stream is read in a round."""
        stateful = [client_id for client_id in self.learner_proxy.client_ids if not _number(client_id) % 2]
        return stateful[round_num % len(stateful)]

    def select_clients(self, round_num: int) -> list[str]:
        """The cohort, without the client whose stream is read."""
        return [one for one in super().select_clients(round_num) if one != self.streaming(round_num)]

    async def train_round(self, round_num: int) -> dict[str, float]:
        """Run a round, and digest its results.

        Snapshots of some learners are taken while the others are evaluated, and restored as the next round begins.
        """
        async with self._disturbed(self, round_num):
            with self.activities.doing("restore"):
                if self._snapshots:
                    await self.learner_proxy.restore(self._snapshots)
            async with asyncio.TaskGroup() as group:
                reading = group.create_task(self._read(self.streaming(round_num)))
                training = group.create_task(self._trained(round_num))
                blending = group.create_task(self._blended(round_num))
            cohort = self.select_clients(round_num)
            captured, others = cohort[:_NUM_SNAPSHOTS], cohort[_NUM_SNAPSHOTS:]
            scores, self._snapshots = await asyncio.gather(self._evaluated(others), self._take_snapshots(captured))
            scores |= await self._evaluated(captured)
            reports, self._reports = sorted(self._reports.items()), {}
            self.digests.append(
                {
                    "updates": digest((self._updates, training.result())),
                    "items": digest(reading.result()),
                    "blends": digest(blending.result()),
                    "scores": digest(scores),
                    "snapshots": digest(self._snapshots),
                    "reports": digest(reports),
                    "weights": digest(dict(self.weights or {})),
                }
            )
        return training.result()

    async def _trained(self, round_num: int) -> dict[str, float]:
        with self.activities.doing("train"):
            return await super().train_round(round_num)

    async def aggregate_weights(self, weights_list: Any, num_samples: Any = None) -> dict[str, Tensor]:
        """Aggregate as the bundled trainer; the updates of the clients are part of the digest."""
        self._updates = (weights_list, num_samples)
        return await super().aggregate_weights(weights_list, num_samples)

    async def _evaluated(self, client_ids: list[str]) -> dict[str, Any]:
        group = self.learner_proxy.clients(client_ids)
        mean = tfr.WeightedMean(("accuracy", "loss"))
        weights = await self.learner_proxy.share(self.weights)
        with self.activities.doing("evaluate"):
            scores = await group.evaluate(model_weights=weights)
        with self.activities.doing("reduce"):
            reduced = await group.reduce("evaluate", mean, model_weights=weights)
        return {**scores, f"mean of {client_ids}": (reduced.value, reduced.count)}

    async def _blended(self, round_num: int) -> dict[str, Tensor]:
        stateful = [one for one in self.select_clients(round_num) if not _number(one) % 2]
        group = self.learner_proxy.clients(stateful[-_NUM_BLENDING:])
        with self.activities.doing("share"):  # the value travels to a worker with the first call there
            values = await self.learner_proxy.share(torch.arange(_LARGE) * (0.5 + round_num))
            return dict(await group.call("blend", values))

    async def _take_snapshots(self, client_ids: list[str]) -> dict[str, bytes]:
        if are_stateless():
            return {}
        with self.activities.doing("snapshot"):
            return {client_id: data async for client_id, data in self.learner_proxy.snapshots(client_ids)}

    async def _read(self, client_id: str) -> list[Any]:
        with self.activities.doing("stream"):
            reports = list(self._reports.get(client_id, []))
            while True:  # a stream is lost with its worker, and its learner is rebuilt as it was before
                try:
                    stream = self.learner_proxy.stream(client_id, STREAM_METHOD, STREAM_ITEMS)
                    return [item async for item in stream]
                except tfr.WorkerLostError as error:
                    if "the stream with it" not in str(error):
                        raise
                    self._reports[client_id] = list(reports)

    def _note(self, event: Event) -> None:
        if isinstance(event, ProgressReported):
            self._reports.setdefault(event.client_id, []).append(event.progress)


@asynccontextmanager
async def undisturbed(trainer: ChaosTrainer, round_num: int) -> AsyncIterator[None]:
    """Do nothing to a round."""
    yield


def open_proxy(runtime: Mapping[str, Any], seed: int) -> tfr.LearnerProxy:
    """The learners of the run, to be opened.

    Args:
        runtime: The runtime configuration.
        seed: Seeds the learners' random streams.
    """
    labels = synthetic(num_samples=_DATASET["num_samples"]).train.labels.numpy()
    clients = {
        f"client_{number}": {"dataset": _DATASET, "model": _MODEL, "seed": 0, "indices": indices, "momentum": 0.5}
        for number, indices in enumerate(iid(labels, NUM_CLIENTS), start=1)
    }
    learner = make_stateless_learner if are_stateless() else make_learner
    return tfr.LearnerProxy(learner, clients, runtime=runtime, seed=seed)


async def federate(
    proxy: tfr.LearnerProxy,
    num_rounds: int,
    disturbed: Disturbed = undisturbed,
    checkpoints: tfr.Checkpoints | None = None,
) -> list[Digests]:
    """Train through an open proxy of `open_proxy`.

    Args:
        proxy: The open proxy.
        num_rounds: How many rounds there are.
        disturbed: A context manager around each round.
        checkpoints: Where the run is saved, and from where it continues.

    Returns:
        The digests of each round, and those of `end_of`.
    """
    trainer = ChaosTrainer(proxy, num_rounds, disturbed)
    trainer.checkpoints = checkpoints
    await trainer.train()
    return [*trainer.digests, await end_of(trainer)]


async def end_of(trainer: ChaosTrainer) -> Digests:
    """The digests of the global weights and of the state of every learner, between two rounds."""
    states = [] if are_stateless() else [one async for one in trainer.learner_proxy.snapshots()]
    return {"weights": digest(dict(trainer.weights or {})), "snapshots": digest(states)}


def differing(digests: Digests, expected: Digests) -> list[str]:
    """The parts that have other bits than they should have."""
    return [name for name, value in expected.items() if digests[name] != value]


def digest(value: Any) -> str:
    """SHA-256 of a value; equal values have equal bits."""
    return hashlib.sha256(fingerprint(value)).hexdigest()


def _number(client_id: str) -> int:
    return int(client_id.rpartition("_")[2])
