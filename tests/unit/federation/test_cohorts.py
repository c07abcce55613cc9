"""Cohorts and simulated clients: who takes part, as a function of seed and round alone."""

from __future__ import annotations

import asyncio
import math
from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest

import torchfedrpc as tfr
from torchfedrpc.errors import ConfigError

CLIENTS = [f"client_{number}" for number in range(20)]


def trainer(seed: int = 0, **attributes: Any) -> Any:
    return SimpleNamespace(config=SimpleNamespace(seed=seed), weights=None, **attributes)


def choose(cohort: Any, *, num_rounds: int = 1, size: int = 5, seed: int = 0) -> list[list[str]]:
    async def all_rounds() -> list[list[str]]:
        return [list(await cohort(trainer(seed), number, CLIENTS, size)) for number in range(num_rounds)]

    return asyncio.run(all_rounds())


@pytest.mark.parametrize(
    "cohort",
    [
        tfr.UniformCohort(),
        tfr.WeightedCohort(dict.fromkeys(CLIENTS, 3)),
        tfr.RoundRobinCohort(),
        tfr.AvailabilityWindows(4, 0.5),
    ],
    ids=lambda one: type(one).__name__,
)
def test_a_cohort_follows_from_seed_and_round(cohort: Any) -> None:
    chosen = choose(cohort, num_rounds=6)
    assert chosen == choose(cohort, num_rounds=6)
    assert len({tuple(clients) for clients in chosen}) > 2
    for clients in chosen:
        assert len(set(clients)) == len(clients) <= 5
        assert clients == sorted(clients, key=CLIENTS.index) or isinstance(cohort, tfr.RoundRobinCohort)
    if not isinstance(cohort, tfr.RoundRobinCohort):
        assert chosen != choose(cohort, num_rounds=6, seed=1)


def test_round_robin_gives_each_client_the_same_number_of_turns() -> None:
    turns = Counter(client for clients in choose(tfr.RoundRobinCohort(), num_rounds=8) for client in clients)
    assert turns == dict.fromkeys(CLIENTS, 2)


def test_clients_are_drawn_by_their_samples() -> None:
    num_samples = dict.fromkeys(CLIENTS, 1) | {"client_3": 200, "client_4": 0}
    drawn = Counter(
        client for clients in choose(tfr.WeightedCohort(num_samples), num_rounds=40) for client in clients
    )
    assert drawn["client_3"] == 40
    assert drawn["client_4"] == 0


def test_windows_open_and_close() -> None:
    chosen = choose(tfr.AvailabilityWindows(10, 0.3), num_rounds=10, size=20)
    assert Counter(client for clients in chosen for client in clients) == dict.fromkeys(CLIENTS, 3)
    with pytest.raises(ConfigError, match=r"cohort\.period is at least 1"):
        tfr.AvailabilityWindows(0, 0.5)


class Scored:
    """Learner with a loss of its own."""

    def __init__(self, client_id: str) -> None:
        self.loss = float(client_id.partition("_")[2])

    def evaluate(self, model_weights: Any = None) -> dict[str, float]:
        return {"loss": self.loss}


async def test_power_of_choice_takes_the_candidates_with_the_highest_loss() -> None:
    cohort = tfr.PowerOfChoiceCohort(dict.fromkeys(CLIENTS, 1), num_candidates=20)
    async with tfr.LearnerProxy(Scored, CLIENTS, runtime="local") as proxy:
        assert await cohort(trainer(learner_proxy=proxy), 0, CLIENTS, 3) == CLIENTS[-3:]
        some = await tfr.PowerOfChoiceCohort(dict.fromkeys(CLIENTS, 1), 6)(
            trainer(learner_proxy=proxy), 0, CLIENTS, 3
        )
        assert some != CLIENTS[-3:]
        with pytest.raises(ConfigError, match=r"num_candidates=2 is below trainer\.clients_per_round=3"):
            await tfr.PowerOfChoiceCohort({}, 2)(trainer(learner_proxy=proxy), 0, CLIENTS, 3)


class Odd(Scored):
    """One has no loss, and one fails."""

    def evaluate(self, model_weights: Any = None) -> dict[str, float]:
        if self.loss == 19:
            raise LookupError("lost")
        return {"loss": math.nan if self.loss == 4 else self.loss}


async def test_power_of_choice_with_losses_that_are_nan_and_candidates_that_fail() -> None:
    cohort = tfr.PowerOfChoiceCohort(dict.fromkeys(CLIENTS, 1), num_candidates=20)
    async with tfr.LearnerProxy(Odd, CLIENTS, runtime="local") as proxy:
        dropping = SimpleNamespace(
            config=SimpleNamespace(seed=0, on_failure="drop"), weights=None, learner_proxy=proxy
        )
        assert await cohort(dropping, 0, CLIENTS, 3) == ["client_4", "client_17", "client_18"]
        with pytest.raises(tfr.GroupCallError, match="LookupError: lost"):
            await cohort(trainer(learner_proxy=proxy), 0, CLIENTS, 3)


def test_numbers_of_samples_that_draw_nobody_are_refused() -> None:
    with pytest.raises(ConfigError, match="all of them are 0"):
        choose(tfr.WeightedCohort(dict.fromkeys(CLIENTS, 0)))
    with pytest.raises(ConfigError, match="the number of samples of client_3, and has None"):
        choose(tfr.WeightedCohort({client: 1 for client in CLIENTS if client != "client_3"}))
    with pytest.raises(ConfigError, match="the number of samples of client_3, and has -1"):
        choose(tfr.WeightedCohort(dict.fromkeys(CLIENTS, 1) | {"client_3": -1}))


async def test_a_cohort_drawn_by_samples_whose_models_are_weighted_by_them_is_told(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async with tfr.LearnerProxy(Scored, CLIENTS, runtime="local") as proxy:
        for weighting, is_told in (("samples", True), ("uniform", False)):
            cohort = tfr.WeightedCohort(dict.fromkeys(CLIENTS, 1))
            tfr.FedAvgTrainer({"weighting": weighting}, proxy, cohort=cohort)
            assert ("WeightedCohort draws clients by their numbers of samples" in caplog.text) == is_told
            caplog.clear()


def test_a_fraction_of_the_clients_is_slow_exactly() -> None:
    for seed in range(5):
        clients = tfr.SimulatedClients(slow_fraction=0.3, slow_factor=4, seed=seed, clients=tuple(CLIENTS))
        assert sum(clients.seconds(client, 0) == 4 for client in CLIENTS) == 6


def test_a_client_that_is_done_at_the_deadline_is_not_late() -> None:
    clients = tfr.SimulatedClients(seconds_per_epoch=0.1, deadline_s=0.3)
    assert clients.plan(["a"], 0, 3).epochs == {"a": 3}
    partial = tfr.SimulatedClients(seconds_per_epoch=0.1, deadline_s=0.3, partial=True)
    assert partial.plan(["a"], 0, 4).epochs == {"a": 3}


def test_a_round_with_a_deadline_waits_for_clients_that_drop_out() -> None:
    planned = tfr.SimulatedClients(dropout=0.99, deadline_s=7, seed=1).plan(CLIENTS, 0, 1)
    assert planned.dropped
    assert planned.seconds == 7


def test_slow_clients_are_late_and_others_not() -> None:
    clients = tfr.SimulatedClients(slow_fraction=0.5, slow_factor=4, deadline_s=5, seed=3)
    slow = [client for client in CLIENTS if clients.seconds(client, 0) == 4]
    assert 0 < len(slow) < len(CLIENTS)
    planned = clients.plan(CLIENTS, 0, 3)
    assert planned.dropped == slow
    assert set(planned.epochs.values()) == {3}
    assert planned.seconds == 5
    partial = tfr.SimulatedClients(slow_fraction=0.5, slow_factor=4, deadline_s=5, partial=True, seed=3)
    assert partial.plan(CLIENTS, 0, 3).epochs == {client: 1 if client in slow else 3 for client in CLIENTS}
    patient = tfr.SimulatedClients(slow_fraction=0.5, slow_factor=4, seed=3)
    assert patient.plan(CLIENTS, 0, 3).seconds == 12


def test_dropouts_are_drawn_for_each_round() -> None:
    clients = tfr.SimulatedClients(dropout=0.3, seed=1)
    dropped = [tuple(clients.plan(CLIENTS, number, 1).dropped) for number in range(50)]
    assert len(set(dropped)) > 10
    assert 0.25 < sum(map(len, dropped)) / (50 * len(CLIENTS)) < 0.35
    assert clients.plan(CLIENTS, 7, 1) == tfr.SimulatedClients(dropout=0.3, seed=1).plan(CLIENTS, 7, 1)


@pytest.mark.parametrize(
    "settings",
    [
        {"dropout": -0.1},
        {"dropout": 1.0},
        {"slow_fraction": 2},
        {"slow_factor": 0.5},
        {"spread": -1},
        {"deadline_s": 0},
        {"deadline_s": "20"},
        {"partial": "no"},
        {"seconds_per_epoch": math.inf},
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=rf"simulation\.{next(iter(settings))}"):
        tfr.SimulatedClients(**settings)
