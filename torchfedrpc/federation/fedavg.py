"""Federated averaging, and FedProx."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Protocol

from torch import Tensor

from torchfedrpc.errors import ConfigError
from torchfedrpc.events import RoundEnded
from torchfedrpc.federation.trainer import AbstractFederationTrainer
from torchfedrpc.proxy import LearnerProxy
from torchfedrpc.reduce.reducers import WeightedMean
from torchfedrpc.registry import trainer


class RoundLog(Protocol):
    """Log of finished rounds, such as a list."""

    def append(self, ended: RoundEnded, /) -> object:
        """Append a finished round."""


@trainer("fedavg")
class FedAvgTrainer(AbstractFederationTrainer):
    """Federated averaging: each round trains a cohort from the global weights and averages (McMahan et al. 2017).

    Updates are averaged on the workers. A subclass that overrides `aggregate_weights` receives all updates on the
    driver.

    Args:
        config: ``num_rounds``, ``local_epochs`` (default: 1), ``clients_per_round`` and ``seed``.
        learner_proxy: Learners with the `train_epoch` that `Learner` describes.
        initial_weights: Initial global weights, a state dict. Default: Each learner starts with its initial weights.
        score: Returns metrics by name for global weights; called at the end of each round.
        history: Receives the end of each round, with its metrics. Default: A new list.

    Attributes:
        weights: The global weights, a state dict; None before the first round without ``initial_weights``.
        history: The log of rounds.
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
            ``train_loss`` (mean over the cohort's samples), ``num_clients``, and the metrics of ``score``.
        """
        cohort = self.learner_proxy.clients(self.select_clients(round_num))
        arguments = {"model_weights": self.weights, "round_num": round_num, **self.local_settings()}
        if _averages(type(self)):
            mean = await cohort.reduce("train_epoch", WeightedMean(("model_weights", "train_loss")), **arguments)
            self.weights, train_loss, num_clients = mean.value["model_weights"], mean.value["train_loss"], mean.count
        else:
            updates = list((await cohort.train_epoch(**arguments)).values())
            num_samples = [update["num_samples"] for update in updates]
            losses = [update["train_loss"] * update["num_samples"] for update in updates if update["num_samples"]]
            self.weights = await self.aggregate_weights([update["model_weights"] for update in updates], num_samples)
            train_loss = math.fsum(losses) / sum(num_samples) if losses else math.nan
            num_clients = len(updates)
        return {
            "train_loss": train_loss,
            "num_clients": num_clients,
            **(self._score(self.weights) if self._score else {}),
        }

    def local_settings(self) -> dict[str, Any]:
        """Return the keyword arguments of ``train_epoch`` beside weights and round, the same for every client."""
        return {"local_epochs": self._count("local_epochs", default=1, least=1)}


@trainer("fedprox")
class FedProxTrainer(FedAvgTrainer):
    """FedAvg with clients that minimise their loss plus ``mu / 2 * ||w - w_global||^2`` (Li et al. 2020).

    The config has ``mu`` (>= 0) beside FedAvg's settings; learners receive it as ``proximal_mu``.
    """

    def local_settings(self) -> dict[str, Any]:
        """Return FedAvg's arguments and ``proximal_mu``.

        Raises:
            ConfigError: If the config has no valid ``mu``.
        """
        mu = getattr(self.config, "mu", None)
        if not isinstance(mu, int | float) or not mu >= 0:
            raise ConfigError(f"FedProx needs mu, a number of at least 0, in the trainer's settings; it is {mu!r}")
        return {**super().local_settings(), "proximal_mu": mu}


def _averages(kind: type[FedAvgTrainer]) -> bool:
    """Return whether the class aggregates updates as the base class does, so that workers can average them."""
    return kind.aggregate_weights is AbstractFederationTrainer.aggregate_weights
