"""Federated averaging, and FedProx."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from types import FunctionType
from typing import Any, ClassVar, Protocol

from torch import Tensor

from torchfedrpc.errors import ConfigError
from torchfedrpc.events import RoundEnded
from torchfedrpc.federation.aggregation import Aggregator, Mean, ReducingAggregator
from torchfedrpc.federation.trainer import AbstractFederationTrainer
from torchfedrpc.proxy import LearnerProxy
from torchfedrpc.reduce.reducers import Reducer
from torchfedrpc.registry import trainer


class RoundLog(Protocol):
    """Log of finished rounds, such as a list."""

    def append(self, ended: RoundEnded, /) -> object:
        """Append a finished round."""


@trainer("fedavg")
class FedAvgTrainer(AbstractFederationTrainer):
    """Federated averaging: each round trains a cohort from the global weights and averages (McMahan et al. 2017).

    Updates are averaged on the workers. Another aggregator than the mean, and a subclass that overrides
    `aggregate_weights`, receive all updates on the driver.

    Args:
        config: ``num_rounds``, ``local_epochs`` (default: 1), ``clients_per_round`` and ``seed``.
        learner_proxy: Learners with the `train_epoch` that `Learner` describes.
        initial_weights: Initial global weights, a state dict. Default: Each learner starts with its initial weights.
        score: Returns metrics by name for global weights; called at the end of each round.
        history: Receives the end of each round, with its metrics. Default: A new list.
        aggregator: Makes the new global model of the models of a cohort. Unless it is a function, it is part of the
            trainer's state. Default: Their weighted mean.

    Attributes:
        weights: The global weights, a state dict; None before the first round without ``initial_weights``.
        history: The log of rounds.
        aggregator: The aggregator.

    Raises:
        ConfigError: If an aggregator is given to a subclass that overrides `aggregate_weights`.
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
        aggregator: Aggregator | None = None,
    ) -> None:
        super().__init__(config, learner_proxy)
        self.aggregator: Aggregator = Mean() if aggregator is None else aggregator
        if not isinstance(self.aggregator, Mean) and self._overrides_aggregation():
            raise ConfigError(
                f"{type(self).__qualname__} aggregates by its own aggregate_weights, and would ignore the aggregator "
                f"{aggregator!r}: leave one of them out"
            )
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
        if (reducer := self._reducer()) is not None:
            reduced = await cohort.reduce("train_epoch", reducer, **arguments)
            if not isinstance(reduced.value, Mapping) or "model_weights" not in reduced.value:
                made = type(reduced.value).__name__
                raise ConfigError(
                    f"the reducer of the aggregator {self.aggregator!r} made a {made}: it must make a mapping with "
                    f"model_weights"
                )
            aggregate, num_clients = reduced.value["model_weights"], reduced.count
            train_loss = reduced.value.get("train_loss", math.nan)
        else:
            updates = list((await cohort.train_epoch(**arguments)).values())
            num_samples = [update["num_samples"] for update in updates]
            losses = [update["train_loss"] * update["num_samples"] for update in updates if update["num_samples"]]
            aggregate = await self.aggregate_weights([update["model_weights"] for update in updates], num_samples)
            train_loss = math.fsum(losses) / sum(num_samples) if losses else math.nan
            num_clients = len(updates)
        weights = self.step(aggregate)
        if (odd := _odd_names(weights, aggregate)) is not None:
            raise ConfigError(
                f"{type(self).__qualname__}.step() returned {odd:.200}: it must return the new global weights, a "
                f"state dict with the names of its argument, {list(aggregate)!s:.200}"
            )
        self.weights = weights
        return {
            "train_loss": train_loss,
            "num_clients": num_clients,
            **(self._score(self.weights) if self._score else {}),
        }

    def step(self, aggregate: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Return the new global weights, from the aggregate of the clients' models and ``weights``.

        Here it is the aggregate. Subclasses may treat ``weights - aggregate`` as the gradient of an optimiser on the
        server, as FedOpt does (Reddi et al. 2021).
        """
        return aggregate

    async def aggregate_weights(
        self, weights_list: Sequence[Mapping[str, Tensor]], num_samples: Sequence[float] | None = None
    ) -> dict[str, Tensor]:
        """Return the aggregate of models, a state dict, by ``aggregator``. Its exceptions are propagated.

        Args:
            weights_list: A state dict per client, all with the same names and shapes.
            num_samples: Number of samples of each client. Default: 1.

        Raises:
            ConfigError: If the aggregator returns no state dict, or one with other names.
        """
        counts = [1.0] * len(weights_list) if num_samples is None else num_samples
        aggregate = await asyncio.to_thread(self.aggregator, weights_list, counts)
        if (odd := _odd_names(aggregate, weights_list[0])) is not None:
            raise ConfigError(
                f"the aggregator {self.aggregator!r} returned {odd:.200}: it must return a state dict with the names "
                f"of the models, {list(weights_list[0])!s:.200}"
            )
        return dict(aggregate)

    def _is_data(self, name: str, value: Any) -> bool:
        is_code = name == "aggregator" and isinstance(value, Mean | FunctionType | partial)
        return not is_code and super()._is_data(name, value)

    def _reducer(self) -> Reducer | None:
        """Return what forms the aggregate on the workers; None if the driver needs all updates."""
        if not self._overrides_aggregation() and isinstance(self.aggregator, ReducingAggregator):
            return self.aggregator.reducer()
        return None

    @classmethod
    def _overrides_aggregation(cls) -> bool:
        return cls.aggregate_weights is not FedAvgTrainer.aggregate_weights

    def local_settings(self) -> dict[str, Any]:
        """Return the keyword arguments of ``train_epoch`` beside weights and round, the same for every client."""
        return {"local_epochs": self._count("local_epochs", default=1, least=1)}


def _odd_names(returned: Any, expected: Mapping[str, Any]) -> str | None:
    """Return, as a text, what was returned in place of a state dict with the expected names; None for such a one."""
    if isinstance(returned, Mapping):
        return None if returned.keys() == expected.keys() else str(list(returned))
    return f"a {type(returned).__name__}"


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
