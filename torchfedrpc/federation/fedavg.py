"""Federated averaging."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Protocol

from torch import Tensor

from torchfedrpc.events import RoundEnded
from torchfedrpc.federation.trainer import AbstractFederationTrainer
from torchfedrpc.proxy import LearnerProxy
from torchfedrpc.reduce.reducers import WeightedMean
from torchfedrpc.registry import trainer


class RoundLog(Protocol):
    """Where a trainer leaves its finished rounds; a list will do."""

    def append(self, ended: RoundEnded, /) -> object:
        """Take the next round."""


@trainer("fedavg")
class FedAvgTrainer(AbstractFederationTrainer):
    """Train a cohort from the global weights, average, begin again (McMahan et al. 2017).

    Updates are averaged on the workers; a subclass that overrides `aggregate_weights` is given them all.

    Args:
        config: ``num_rounds``, ``local_epochs`` (default: 1), ``clients_per_round`` and ``seed``.
        learner_proxy: learners with the `train_epoch` that `Learner` describes.
        initial_weights: the global weights to begin with, a state dict. By default each learner begins with
            its own.
        score: from global weights to metrics by name, taken at the end of each round.
        history: takes each round's end, with its metrics.

    Attributes:
        weights: the global weights; None before the first round where none were given.
        history: as given, else a list.
    """

    not_state: ClassVar[frozenset[str]] = AbstractFederationTrainer.not_state | {"_score"}

    def __init__(
        self,
        config: Any,
        learner_proxy: LearnerProxy,
        *,
        initial_weights: Mapping[str, Tensor] | None = None,
        score: Callable[[Mapping[str, Tensor]], Mapping[str, float]] | None = None,
        history: RoundLog | None = None,
    ) -> None:
        super().__init__(config, learner_proxy)
        self.weights = initial_weights
        self.history: RoundLog = [] if history is None else history
        self._score = score

    async def train(self) -> Mapping[str, Tensor] | None:
        """Run all rounds.

        Returns:
            The final global weights, a state dict.
        """
        async for round_num in self.rounds():
            metrics = await self.train_round(round_num)
            ended = RoundEnded(round_num, self.num_rounds, metrics)
            self.history.append(ended)
            self.learner_proxy.publish(ended)
        return self.weights

    async def train_round(self, round_num: int) -> dict[str, float]:
        """Run one round and replace ``weights``.

        Returns:
            ``train_loss`` (mean over the cohort's samples), ``num_clients``, and what ``score`` gives.
        """
        cohort = self.learner_proxy.clients(self.select_clients(round_num))
        arguments = {"model_weights": self.weights, "round_num": round_num, **self.local_settings()}
        if _averages(type(self)):
            mean = await cohort.reduce("train_epoch", WeightedMean(("model_weights", "train_loss")), **arguments)
            self.weights, train_loss, num_clients = mean.value["model_weights"], mean.value["train_loss"], mean.count
        else:
            updates = list((await cohort.train_epoch(**arguments)).values())
            num_samples = [update["num_samples"] for update in updates]
            losses = [update["train_loss"] * update["num_samples"] for update in updates]
            self.weights = await self.aggregate_weights([update["model_weights"] for update in updates], num_samples)
            train_loss, num_clients = math.fsum(losses) / sum(num_samples), len(updates)
        return {
            "train_loss": train_loss,
            "num_clients": num_clients,
            **(self._score(self.weights) if self._score else {}),
        }

    def local_settings(self) -> dict[str, Any]:
        """What every client's ``train_epoch`` is told beside weights and round."""
        return {"local_epochs": self._count("local_epochs", default=1, least=1)}


def _averages(kind: type[FedAvgTrainer]) -> bool:
    """Whether updates are aggregated as the base class does it: then nobody need see each."""
    return kind.aggregate_weights is AbstractFederationTrainer.aggregate_weights
