"""The federated run that chaos disturbs: FedAvg over clients of which half keep state, a stream and a reduction."""

from __future__ import annotations

import asyncio
import faulthandler
import hashlib
import random
import signal
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import torchfedrpc as tfr
from torchfedrpc.events import Event, ProgressReported
from torchfedrpc.experiments.classification import ClassificationLearner
from torchfedrpc.experiments.data.partition import iid
from torchfedrpc.experiments.data.synthetic import synthetic
from torchfedrpc.experiments.model import build_model, initial_weights
from torchfedrpc.federation.fedavg import FedAvgTrainer
from torchfedrpc.wire.fingerprint import fingerprint

NUM_CLIENTS = 12
COHORT_SIZE = 10
LOCAL_EPOCHS = 16
STREAM_ITEMS = 12
STREAM_METHOD = "own_epochs"
_NUM_SNAPSHOTS = 3
_NUM_BLENDING = 2
_LARGE = 600_000  # float32: so large that workers map what they are given, and the driver what they return
_OWN_BATCH_SIZE = 64
_DATASET = {"_target_": "torchfedrpc.experiments.data.synthetic.synthetic", "num_samples": 2500}
_MODEL = {"_target_": "torchfedrpc.experiments.models.mlp.MLP"}

faulthandler.register(signal.SIGUSR2)  # where a round hangs, its workers are asked for their stacks

Digests = dict[str, str]  # SHA-256 of each part of what a round, or a run, gives
Disturbed = Callable[["ChaosTrainer", int], AbstractAsyncContextManager[None]]


class StatefulLearner(ClassificationLearner):
    """Trains a model of its own beside the global one: all that a loss can damage is in it.

    An optimiser with momentum that lasts, draws from the three random streams, a count and a history.
    """

    def __init__(self, client_id: str, **settings: Any) -> None:
        super().__init__(client_id, **settings)
        self._own = build_model(settings["model"], settings["seed"])
        self._optimiser = torch.optim.SGD(self._own.parameters(), lr=0.05, momentum=0.9)
        self._losses: list[float] = []
        self._mixture = torch.zeros(_LARGE)

    def blend(self, values: Tensor) -> Tensor:
        """Take half of the values [_LARGE] into its own, in place; what it returns it goes on with."""
        self._mixture.add_(values).mul_(0.5)
        return self._mixture

    def train_epoch(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """As the bundled learner; trains its own model too."""
        own_loss = self._own_epoch()
        return {**super().train_epoch(*args, **kwargs), "own_loss": own_loss}

    async def evaluate(self, model_weights: Mapping[str, Tensor] | None = None) -> dict[str, Any]:
        """As the bundled learner, in two steps of the event loop, and with noise."""
        scored = super().evaluate(model_weights)
        await asyncio.sleep(0)
        return {**scored, "noise": random.random(), "num_epochs": len(self._losses)}

    def own_epochs(self, count: int) -> Iterator[dict[str, Any]]:
        """Train its own model, an epoch for each item."""
        for _ in range(count):
            yield {"loss": self._own_epoch(), "weights": self._own.state_dict()}

    def state_dict(self) -> dict[str, Any]:
        """All that it learns."""
        own = {"model": self._own.state_dict(), "optimiser": self._optimiser.state_dict(), "losses": self._losses}
        own["mixture"] = self._mixture
        return {**super().state_dict(), "own": own}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from there."""
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


def make_learner(client_id: str, **settings: Any) -> ClassificationLearner:
    """The bundled learner for odd clients, a stateful one for even ones."""
    kind = ClassificationLearner if _number(client_id) % 2 else StatefulLearner
    return kind(client_id, **settings)


class ChaosTrainer(FedAvgTrainer):
    """The bundled FedAvg, and in each round a stream, an evaluation, and some learners set back a little.

    Args:
        proxy: an open proxy of `make_learner`.
        num_rounds: how many rounds.
        disturbed: lasts as long as a round, and does to it what it likes.

    Attributes:
        digests: of each finished round, hashes of all that its calls gave.
    """

    not_state: ClassVar[frozenset[str]] = FedAvgTrainer.not_state | {"_disturbed", "_updates"}

    def __init__(self, proxy: tfr.LearnerProxy, num_rounds: int, disturbed: Disturbed) -> None:
        config = {"num_rounds": num_rounds, "clients_per_round": COHORT_SIZE, "local_epochs": LOCAL_EPOCHS}
        super().__init__(config, proxy, initial_weights=initial_weights(_MODEL, seed=0))
        self.digests: list[Digests] = []
        self._disturbed = disturbed
        self._updates: Any = None
        self._snapshots: dict[str, bytes] = {}
        self._reports: dict[str, list[Any]] = {}
        proxy.subscribe(self._note)

    def streaming(self, round_num: int) -> str:
        """The client that is read by a stream in a round."""
        stateful = [client_id for client_id in self.learner_proxy.client_ids if not _number(client_id) % 2]
        return stateful[round_num % len(stateful)]

    def select_clients(self, round_num: int) -> list[str]:
        """The cohort, without the one that a stream holds."""
        return [one for one in super().select_clients(round_num) if one != self.streaming(round_num)]

    async def train_round(self, round_num: int) -> dict[str, float]:
        """Run one round, and digest it.

        Some learners' snapshots are taken beside the others' evaluation, before their own, and restored as the next
        round begins.
        """
        async with self._disturbed(self, round_num):
            await self.learner_proxy.restore(self._snapshots)
            async with asyncio.TaskGroup() as both:
                reading = both.create_task(self._read(self.streaming(round_num)))
                training = both.create_task(super().train_round(round_num))
                blending = both.create_task(self._blended(round_num))
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
                    "weights": digest(dict(self.weights)),
                }
            )
        return training.result()

    async def aggregate_weights(self, weights_list: Any, num_samples: Any = None) -> dict[str, Tensor]:
        """As ever; what came from the clients is part of the digest."""
        self._updates = (weights_list, num_samples)
        return await super().aggregate_weights(weights_list, num_samples)

    async def _evaluated(self, client_ids: list[str]) -> dict[str, Any]:
        group = self.learner_proxy.clients(client_ids)
        weights = await self.learner_proxy.share(self.weights)
        mean = tfr.WeightedMean(("accuracy", "loss"))
        scores = await group.evaluate(model_weights=weights)
        reduced = await group.reduce("evaluate", mean, model_weights=weights)
        return {**scores, f"mean of {client_ids}": (reduced.value, reduced.count)}

    async def _blended(self, round_num: int) -> dict[str, Tensor]:
        stateful = [one for one in self.select_clients(round_num) if not _number(one) % 2]
        values = torch.arange(_LARGE) * (0.5 + round_num)
        return await self.learner_proxy.clients(stateful[-_NUM_BLENDING:]).call("blend", values)

    async def _take_snapshots(self, client_ids: list[str]) -> dict[str, bytes]:
        return {client_id: data async for client_id, data in self.learner_proxy.snapshots(client_ids)}

    async def _read(self, client_id: str) -> list[Any]:
        return [item async for item in self.learner_proxy.stream(client_id, STREAM_METHOD, STREAM_ITEMS)]

    def _note(self, event: Event) -> None:
        if isinstance(event, ProgressReported):
            self._reports.setdefault(event.client_id, []).append(event.progress)


@asynccontextmanager
async def undisturbed(trainer: ChaosTrainer, round_num: int) -> AsyncIterator[None]:
    """A round as it should be."""
    yield


def open_proxy(runtime: Mapping[str, Any], seed: int) -> tfr.LearnerProxy:
    """The learners of the run, to be opened.

    Args:
        runtime: where they are.
        seed: draws what they draw.
    """
    labels = synthetic(num_samples=_DATASET["num_samples"]).train.labels.numpy()
    clients = {
        f"client_{number}": {"dataset": _DATASET, "model": _MODEL, "seed": 0, "indices": indices, "momentum": 0.5}
        for number, indices in enumerate(iid(labels, NUM_CLIENTS), start=1)
    }
    return tfr.LearnerProxy(make_learner, clients, runtime=runtime, seed=seed)


async def federate(
    proxy: tfr.LearnerProxy,
    num_rounds: int,
    disturbed: Disturbed = undisturbed,
    checkpoints: tfr.Checkpoints | None = None,
) -> list[Digests]:
    """Run it.

    Args:
        proxy: what `open_proxy` gave, open.
        num_rounds: of how many rounds.
        disturbed: what happens to them.
        checkpoints: where the run is saved, and goes on from.

    Returns:
        Those of each round, and one more as `end_of` gives it.
    """
    trainer = ChaosTrainer(proxy, num_rounds, disturbed)
    trainer.checkpoints = checkpoints
    await trainer.train()
    return [*trainer.digests, await end_of(trainer)]


async def end_of(trainer: ChaosTrainer) -> Digests:
    """Those of the global weights and of the state of every learner, between two rounds."""
    states = [(client_id, data) async for client_id, data in trainer.learner_proxy.snapshots()]
    return {"weights": digest(dict(trainer.weights or {})), "snapshots": digest(states)}


def differing(digests: Digests, expected: Digests) -> list[str]:
    """Which parts have other bits than they should have."""
    return [name for name, value in expected.items() if digests[name] != value]


def digest(value: Any) -> str:
    """SHA-256 of a value, the same for the same bits."""
    return hashlib.sha256(fingerprint(value)).hexdigest()


def _number(client_id: str) -> int:
    return int(client_id.rpartition("_")[2])
