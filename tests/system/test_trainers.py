"""Trainers: their settings, cohorts, rounds, and what FedAvg and FedProx make of them."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import torchfedrpc as tfr
from torchfedrpc.events import Event, RoundEnded, RoundStarted, RunEnded, RunStarted
from torchfedrpc.federation.algorithms.fedavg import FedAvgTrainer
from torchfedrpc.federation.algorithms.fedprox import FedProxTrainer

CLIENTS = ["client_1", "client_2", "client_3", "client_4"]


class OneTrainer(tfr.AbstractFederationTrainer):
    """The least that a trainer can be."""

    async def train(self) -> Any:
        return [round_num async for round_num in self.rounds()]


class AddingLearner:
    """Adds its number to the weights it is given, and remembers what it was told."""

    def __init__(self, client_id: str) -> None:
        self.number = int(client_id.removeprefix("client_"))
        self.told: list[dict[str, Any]] = []

    def train_epoch(
        self, model_weights: Mapping[str, Tensor] | None, round_num: int, **settings: Any
    ) -> dict[str, Any]:
        self.told.append({"round_num": round_num, **settings})
        start = torch.zeros(2) if model_weights is None else model_weights["w"]
        weights = {"w": start + self.number}
        return {"model_weights": weights, "num_samples": self.number, "train_loss": float(self.number)}

    def what_it_was_told(self) -> list[dict[str, Any]]:
        return self.told


def _with_proxy(use) -> Any:  # type: ignore[no-untyped-def]
    """Run ``await use(proxy)`` with the clients' learners in this process."""

    async def main() -> Any:
        async with tfr.LearnerProxy(AddingLearner, CLIENTS, runtime="local") as proxy:
            return await use(proxy)

    return asyncio.run(main())


def _make(config: Any) -> OneTrainer:
    async def make(proxy: tfr.LearnerProxy) -> OneTrainer:
        return OneTrainer(config, proxy)

    trainer = _with_proxy(make)
    assert isinstance(trainer, OneTrainer)
    return trainer


@pytest.mark.parametrize("wrap", [dict, lambda **values: SimpleNamespace(**values)])
def test_a_config_is_a_mapping_or_an_object(wrap) -> None:  # type: ignore[no-untyped-def]
    trainer = _make(wrap(num_rounds=7, clients_per_round=2, seed=1))
    assert trainer.config.num_rounds == 7
    assert trainer.num_rounds == 7
    assert len(trainer.select_clients(0)) == 2


def test_all_clients_are_selected_by_default() -> None:
    assert _make({}).select_clients(3) == CLIENTS
    assert _make({"clients_per_round": None}).select_clients(3) == CLIENTS


def test_a_cohort_follows_from_seed_and_round_alone() -> None:
    config = {"clients_per_round": 2, "seed": 5}
    first, second = _make(config), _make(config)
    cohorts = [first.select_clients(round_num) for round_num in range(20)]
    assert cohorts == [second.select_clients(round_num) for round_num in reversed(range(20))][::-1]
    assert cohorts != [_make({**config, "seed": 6}).select_clients(round_num) for round_num in range(20)]


@pytest.mark.parametrize(
    "config",
    [{"clients_per_round": 0}, {"clients_per_round": 5}, {"clients_per_round": 0.5}, {"seed": -1}, {"seed": True}],
)
def test_a_setting_that_cannot_be_met_is_refused(config: dict[str, Any]) -> None:
    with pytest.raises(tfr.ConfigError, match=next(iter(config))):
        _make(config)


def test_a_trainer_without_train_cannot_be_made() -> None:
    async def make(proxy: tfr.LearnerProxy) -> Any:
        return tfr.AbstractFederationTrainer({}, proxy)  # type: ignore[abstract]

    with pytest.raises(TypeError, match=r"abstract.*train"):
        _with_proxy(make)


def test_rounds_need_their_number() -> None:
    async def train(proxy: tfr.LearnerProxy) -> Any:
        return await OneTrainer({}, proxy).train()

    with pytest.raises(tfr.ConfigError, match="num_rounds"):
        _with_proxy(train)


def test_rounds_are_counted_and_announced() -> None:
    events: list[Event] = []

    async def train(proxy: tfr.LearnerProxy) -> Any:
        proxy.subscribe(events.append)
        return await OneTrainer({"num_rounds": 3}, proxy).train()

    assert _with_proxy(train) == [0, 1, 2]
    rounds = [RoundStarted(0, 3), RoundStarted(1, 3), RoundStarted(2, 3)]
    assert events == [RunStarted("local", 4), *rounds, RunEnded(None)]


def test_aggregation_weighs_by_samples_where_they_are_given() -> None:
    states = [{"w": torch.tensor([0.0])}, {"w": torch.tensor([4.0])}]

    async def aggregate(proxy: tfr.LearnerProxy) -> Any:
        trainer = OneTrainer({}, proxy)
        return await trainer.aggregate_weights(states), await trainer.aggregate_weights(states, [3, 1])

    alike, weighed = _with_proxy(aggregate)
    assert alike["w"].item() == 2.0
    assert weighed["w"].item() == 1.0


def test_fedavg_averages_by_samples_round_after_round() -> None:
    async def train(proxy: tfr.LearnerProxy) -> Any:
        trainer = FedAvgTrainer({"num_rounds": 2}, proxy, initial_weights={"w": torch.full((2,), 10.0)})
        return await trainer.train(), trainer.history

    weights, history = _with_proxy(train)
    assert torch.equal(weights["w"], torch.full((2,), 16.0))  # (1*1 + 2*2 + 3*3 + 4*4) / 10 = 3 a round
    assert [ended.metrics for ended in history] == [{"train_loss": 3.0, "num_clients": 4}] * 2


class IdleLearner(AddingLearner):
    """Its first clients have no samples."""

    def train_epoch(self, *args: Any, num_idle: int = 0, **settings: Any) -> dict[str, Any]:
        update = super().train_epoch(*args, **settings)
        return {**update, "num_samples": 0, "train_loss": math.nan} if self.number <= num_idle else update


class LastTrainer(FedAvgTrainer):
    """Takes the weights of the last client."""

    def local_settings(self) -> dict[str, Any]:
        return {"num_idle": self.config["num_idle"]}

    async def aggregate_weights(self, weights_list: Any, num_samples: Any = None) -> Any:
        return weights_list[-1]


@pytest.mark.parametrize(("num_idle", "train_loss"), [(1, 29 / 9), (4, math.nan)])
def test_a_client_without_samples_has_no_part_in_the_loss(num_idle: int, train_loss: float) -> None:
    async def main() -> dict[str, float]:
        async with tfr.LearnerProxy(IdleLearner, CLIENTS, runtime="local") as proxy:
            return await LastTrainer({"num_rounds": 1, "num_idle": num_idle}, proxy).train_round(0)

    assert asyncio.run(main()) == {"train_loss": pytest.approx(train_loss, nan_ok=True), "num_clients": 4}


def test_fedavg_begins_with_the_learners_own_weights_where_it_is_given_none() -> None:
    async def train(proxy: tfr.LearnerProxy) -> Any:
        return await FedAvgTrainer({"num_rounds": 1}, proxy).train()

    assert _with_proxy(train)["w"].tolist() == [3.0, 3.0]


def test_fedavg_scores_and_announces_every_round() -> None:
    events: list[Event] = []

    async def train(proxy: tfr.LearnerProxy) -> Any:
        proxy.subscribe(events.append)
        trainer = FedAvgTrainer(
            {"num_rounds": 2}, proxy, score=lambda weights: {"test_accuracy": float(weights["w"][0])}
        )
        await trainer.train()
        return trainer.history

    history = _with_proxy(train)
    ended = [event for event in events if isinstance(event, RoundEnded)]
    assert ended == history
    assert [event.metrics["test_accuracy"] for event in ended] == [3.0, 6.0]


def test_fedavg_trains_the_cohort_alone() -> None:
    async def train(proxy: tfr.LearnerProxy) -> Any:
        trainer = FedAvgTrainer({"num_rounds": 5, "clients_per_round": 1, "local_epochs": 3}, proxy)
        await trainer.train()
        told = await proxy.clients().what_it_was_told()
        return [trainer.select_clients(round_num)[0] for round_num in range(5)], told

    selected, told = _with_proxy(train)
    for client_id in CLIENTS:
        rounds = [round_num for round_num in range(5) if selected[round_num] == client_id]
        assert told[client_id] == [{"round_num": round_num, "local_epochs": 3} for round_num in rounds]


def test_fedprox_tells_the_learners_mu() -> None:
    async def train(proxy: tfr.LearnerProxy) -> Any:
        await FedProxTrainer({"num_rounds": 1, "mu": 0.1}, proxy).train()
        return await proxy.client("client_1").what_it_was_told()

    assert _with_proxy(train) == [{"round_num": 0, "local_epochs": 1, "proximal_mu": 0.1}]


@pytest.mark.parametrize("config", [{}, {"mu": -1}, {"mu": "much"}])
def test_fedprox_needs_mu(config: dict[str, Any]) -> None:
    async def train(proxy: tfr.LearnerProxy) -> Any:
        await FedProxTrainer({"num_rounds": 1, **config}, proxy).train()

    with pytest.raises(tfr.ConfigError, match="mu"):
        _with_proxy(train)


def test_bundled_trainers_are_registered() -> None:
    assert tfr.get_trainer("fedavg") is FedAvgTrainer
    assert tfr.get_trainer("fedprox") is FedProxTrainer
