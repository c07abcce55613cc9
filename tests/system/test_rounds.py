"""Rounds of the bundled trainers whose clients fail, diverge, are late, or do not go together."""

from __future__ import annotations

import asyncio
import math
from typing import Any

import pytest
import torch

import torchfedrpc as tfr
from torchfedrpc.errors import ConfigError

CLIENTS = ["a", "b", "c"]
AGGREGATORS = [None, tfr.CoordinateMedian()]


class OddLearner:
    """Adds one to the weights; client c does ``odd`` in odd rounds."""

    def __init__(self, client_id: str, odd: str = "") -> None:
        self.odd = odd if client_id == "c" else ""

    async def train_epoch(self, model_weights: Any, round_num: int = 0, local_epochs: int = 1) -> dict[str, Any]:
        """Train."""
        weights = {name: value + 1 for name, value in model_weights.items()}
        if round_num % 2 and self.odd:
            match self.odd:
                case "fail":
                    raise LookupError("lost")
                case "wait":
                    await asyncio.Event().wait()
                case "keys":
                    weights["extra"] = torch.ones(1)
                case "shape":
                    weights["w"] = torch.ones(3)
                case "nan":
                    weights["w"] = weights["w"] * math.nan
        return {"model_weights": weights, "num_samples": 0 if self.odd == "empty" else 2, "train_loss": 0.5}


class EmptyLearner(OddLearner):
    """Has no samples."""

    def __init__(self, client_id: str) -> None:
        self.odd = "empty"


async def train(odd: str = "", *, kind: Any = tfr.FedAvgTrainer, **given: Any) -> Any:
    """Three rounds; returns the final weight and the metrics of all rounds."""
    names = ("aggregator", "simulation", "cohort")
    arguments = {name: given.pop(name) for name in names if name in given}
    clients: Any = {client: {"odd": odd} for client in CLIENTS}
    async with tfr.LearnerProxy(OddLearner, clients, runtime="local") as proxy:
        weights = {"w": torch.zeros(2)}
        trainer = kind({"num_rounds": 3, **given}, proxy, initial_weights=weights, **arguments)
        final = await trainer.train()
        return final["w"].tolist(), [ended.metrics for ended in trainer.history]


@pytest.mark.parametrize("aggregator", AGGREGATORS)
async def test_a_client_that_fails_ends_the_run_unless_it_may_drop_out(
    aggregator: Any, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(tfr.GroupCallError, match="train_epoch failed for c, first with LookupError: lost"):
        await train("fail", aggregator=aggregator)
    weights, metrics = await train("fail", aggregator=aggregator, on_failure="drop")
    assert weights == [3, 3]
    assert [one["num_dropped"] for one in metrics] == [0, 1, 0]
    assert [one["num_clients"] for one in metrics] == [3, 2, 3]
    assert "c is left out of round 2: LookupError: lost" in caplog.text


@pytest.mark.parametrize("aggregator", AGGREGATORS)
async def test_a_round_goes_on_without_a_client_that_is_late(aggregator: Any) -> None:
    for settings in ({"deadline_s": 0.5}, {"min_results": 2}):
        weights, metrics = await train("wait", aggregator=aggregator, **settings)
        assert weights == [3, 3]
        assert metrics[1]["num_clients"] == 2


@pytest.mark.parametrize("aggregator", AGGREGATORS)
async def test_a_client_that_fails_in_time_is_not_late(aggregator: Any) -> None:
    with pytest.raises(tfr.GroupCallError, match=r"failed for c, first with LookupError: lost; .*on_failure=drop"):
        await train("fail", aggregator=aggregator, deadline_s=30)
    _, metrics = await train("fail", aggregator=aggregator, deadline_s=30, on_failure="drop")
    assert metrics[1]["num_clients"] == 2


@pytest.mark.parametrize("aggregator", AGGREGATORS)
async def test_clients_whose_models_differ_are_named_with_the_first_difference(aggregator: Any) -> None:
    with pytest.raises(ValueError, match=r"\ba and c\b.*extra|c has extra, which the global model lacks"):
        await train("keys", aggregator=aggregator)
    with pytest.raises(ValueError, match=r"\ba and c\b.*'w'.*\[3\]|'w' has shape \[3\] in the model of c, and"):
        await train("shape", aggregator=aggregator)


async def test_fedbuff_names_a_client_whose_model_differs() -> None:
    settings: Any = {"kind": tfr.FedBuffTrainer, "buffer_size": 3, "simulation": tfr.SimulatedClients()}
    with pytest.raises(ValueError, match="the model of c has extra, which the global model lacks"):
        await train("keys", **settings)


async def test_weights_that_are_no_longer_finite_end_the_run_and_a_robust_aggregator_survives_them() -> None:
    with pytest.raises(FloatingPointError, match=r"w of the new global weights is not finite: a client has diverged"):
        await train("nan")
    weights, _ = await train("nan", aggregator=tfr.CoordinateMedian())
    assert weights == [3, 3]


async def test_a_client_whose_model_is_not_finite_is_named_or_left_out(caplog: pytest.LogCaptureFixture) -> None:
    received: list[int] = []

    def counting(models: Any, num_samples: Any) -> Any:
        received.append(len(models))
        return tfr.CoordinateMedian()(models, num_samples)

    await train("nan", aggregator=tfr.CoordinateMedian())
    assert "w of the model of c is not finite, and counts as far off" in caplog.text
    weights, metrics = await train("nan", aggregator=counting, on_failure="drop")
    assert received == [3, 2, 3]
    assert weights == [3, 3]
    assert (metrics[1]["num_clients"], metrics[1]["num_dropped"]) == (2, 1)
    with pytest.raises(FloatingPointError, match="w of the model of c is not finite: the client has diverged"):
        await train("nan", kind=tfr.FedBuffTrainer, buffer_size=3, simulation=tfr.SimulatedClients())


async def test_clients_beyond_a_quorum_are_dropped(caplog: pytest.LogCaptureFixture) -> None:
    _, metrics = await train("wait", min_results=2)
    assert metrics[1]["num_dropped"] == 1
    with pytest.raises(ConfigError, match="min_results must be a whole number from 1 to 3, the size of a cohort"):
        await train(min_results=4)
    caplog.set_level("INFO")
    await train(simulation=tfr.SimulatedClients(slow_fraction=0.7, deadline_s=4, seed=2))
    assert "round 1: " in caplog.text
    assert " dropped out, or were late" in caplog.text


class Forgets(OddLearner):
    """Returns a part of the model."""

    async def train_epoch(self, model_weights: Any, round_num: int = 0, local_epochs: int = 1) -> dict[str, Any]:
        """Train."""
        result = await super().train_epoch(model_weights, round_num, local_epochs)
        del result["model_weights"]["v"]
        return result


async def test_models_that_lack_entries_of_the_global_one_are_refused() -> None:
    async with tfr.LearnerProxy(Forgets, CLIENTS, runtime="local") as proxy:
        weights = {"w": torch.zeros(2), "v": torch.zeros(1)}
        with pytest.raises(ConfigError, match="only the global weights have 'v'"):
            await tfr.FedAvgTrainer({"num_rounds": 1}, proxy, initial_weights=weights).train()


async def test_fedbuff_tells_that_its_results_depend_on_the_machine(caplog: pytest.LogCaptureFixture) -> None:
    await train(kind=tfr.FedBuffTrainer)
    assert "not reproducible: give it simulated clients" in caplog.text
    caplog.clear()
    await train(kind=tfr.FedBuffTrainer, simulation=tfr.SimulatedClients())
    assert "reproducible" not in caplog.text


async def test_clients_without_samples_have_no_mean() -> None:
    async with tfr.LearnerProxy(EmptyLearner, CLIENTS, runtime="local") as proxy:
        trainer = tfr.FedAvgTrainer({"num_rounds": 1}, proxy, initial_weights={"w": torch.zeros(2)})
        with pytest.raises(ValueError, match="no mean, since no result was added or every 'num_samples' was 0"):
            await trainer.train()


async def test_rounds_of_simulated_clients_count_time_and_those_that_drop_out() -> None:
    clients = tfr.SimulatedClients(slow_fraction=0.5, slow_factor=8, deadline_s=4, seed=2, clients=tuple(CLIENTS))
    planned = [clients.plan(CLIENTS, number, 1) for number in range(3)]
    assert 0 < len(planned[0].dropped) < 3
    weights, metrics = await train(simulation=clients)
    assert weights == [3, 3]
    assert [one["num_dropped"] for one in metrics] == [len(plan.dropped) for plan in planned]
    assert [one["simulated_seconds"] for one in metrics] == [4, 8, 12]


async def test_a_round_without_clients_leaves_the_weights(caplog: pytest.LogCaptureFixture) -> None:
    class Nobody(tfr.SimulatedClients):
        def plan(self, cohort: Any, round_num: int, num_epochs: int) -> Any:
            planned = super().plan(cohort, round_num, num_epochs)
            if round_num == 1:
                planned.dropped.extend(planned.epochs)
                planned.epochs.clear()
            return planned

    weights, metrics = await train(simulation=Nobody())
    assert weights == [2, 2]
    assert (metrics[1]["num_clients"], metrics[1]["num_dropped"]) == (0, 3)
    assert "round 2 has no results" in caplog.text


async def test_a_round_with_too_few_clients_leaves_the_weights(caplog: pytest.LogCaptureFixture) -> None:
    async def of_one_in_round_2(trainer: Any, round_num: int, clients: Any, size: int) -> Any:
        return clients[:1] if round_num == 1 else clients

    weights, metrics = await train(cohort=of_one_in_round_2, min_results=2)
    assert weights == [2, 2]
    assert metrics[1]["num_clients"] == 0
    assert "round 2 has no results: 1 clients take part in it, and min_results is 2" in caplog.text


async def fedbuff(
    folder: Any, learner: Any, num_rounds: int = 4, *, config: Any = None, times: int = 1, is_simulated: bool = True
) -> Any:
    async with tfr.LearnerProxy(learner, CLIENTS, runtime="local") as proxy:
        trainer = tfr.FedBuffTrainer(
            {"num_rounds": num_rounds, "buffer_size": 2, "num_in_flight": 3, "on_failure": "drop", **(config or {})},
            proxy,
            initial_weights={"w": torch.zeros(2)},
            simulation=tfr.SimulatedClients(spread=0.5, seed=3) if is_simulated else None,
        )
        trainer.checkpoints = tfr.Checkpoints(folder, resume="auto") if folder else None
        for _ in range(times):
            await trainer.train()
        history: Any = trainer.history
        weights: Any = trainer.weights
        assert not is_simulated or trainer.simulated_seconds == history[-1].metrics["simulated_seconds"] > 0
        return weights["w"].tolist(), [one.metrics for one in history]


class NeverLearner(OddLearner):
    """Client c always fails."""

    async def train_epoch(self, model_weights: Any, round_num: int = 0, local_epochs: int = 1) -> dict[str, Any]:
        """Train."""
        if self.client == "c":
            raise LookupError("lost")
        return await super().train_epoch(model_weights, round_num, local_epochs)

    def __init__(self, client_id: str) -> None:
        super().__init__(client_id)
        self.client = client_id


class FailsLearner(OddLearner):
    """All clients fail."""

    async def train_epoch(self, model_weights: Any, round_num: int = 0, local_epochs: int = 1) -> dict[str, Any]:
        """Train."""
        raise LookupError("lost")


async def test_fedbuff_goes_on_without_a_client_that_fails_and_across_a_resume(tmp_path: Any) -> None:
    expected = await fedbuff(None, NeverLearner)
    assert sum(one["num_dropped"] for one in expected[1]) > 1
    await fedbuff(tmp_path, NeverLearner, 2)
    found = await fedbuff(tmp_path, NeverLearner, 4)
    assert found == expected


async def test_fedbuff_ends_if_all_clients_fail_or_one_may_not() -> None:
    with pytest.raises(tfr.GroupCallError, match="LookupError: lost, the last of 3 in a row"):
        await fedbuff(None, FailsLearner)
    with pytest.raises(tfr.GroupCallError, match=r"failed for c with LookupError: lost; .*on_failure=drop"):
        await fedbuff(None, NeverLearner, config={"on_failure": "raise"})


@pytest.mark.parametrize("is_simulated", [True, False])
async def test_fedbuff_trains_twice(is_simulated: bool) -> None:
    weights, metrics = await fedbuff(None, OddLearner, times=2, is_simulated=is_simulated)
    assert len(metrics) == 8
    assert weights[0] > 4


class LocalPool(tfr.FedAvgTrainer):
    """Keeps its pool in a variable."""

    async def train(self) -> Any:
        """Train."""
        ids = iter(CLIENTS * 3)

        def next_client() -> Any:
            client_id = next(ids)
            return client_id, self.learner_proxy.client(client_id).train_epoch(model_weights=self.weights)

        pool = self.learner_proxy.pool(next_client, 2)
        async for _ in self.rounds():
            await anext(pool)
        await pool.close()


async def test_a_pool_that_checkpoints_do_not_have_is_told(tmp_path: Any, caplog: pytest.LogCaptureFixture) -> None:
    async with tfr.LearnerProxy(OddLearner, CLIENTS, runtime="local") as proxy:
        trainer = LocalPool({"num_rounds": 3}, proxy, initial_weights={"w": torch.zeros(2)})
        trainer.checkpoints = tfr.Checkpoints(tmp_path)
        await trainer.train()
    assert caplog.text.count("a resume will not have their results") == 1
    assert "keep the pool as an attribute of the trainer" in caplog.text


async def test_cohorts_and_settings_that_do_not_fit_are_refused() -> None:
    async def twice(*arguments: Any) -> list[str]:
        return ["a", "a"]

    with pytest.raises(ConfigError, match="must choose different clients of the proxy"):
        await train(cohort=twice)

    class Chooses(tfr.FedAvgTrainer):
        def select_clients(self, round_num: int) -> list[str]:
            return ["a"]

    class ChoosesTwice(tfr.FedAvgTrainer):
        def select_clients(self, round_num: int) -> list[str]:
            return ["a", "a"]

    with pytest.raises(ConfigError, match=r"ChoosesTwice\.select_clients\(\) must choose different clients"):
        await train(kind=ChoosesTwice)
    with pytest.raises(ConfigError, match="by its own select_clients, and would ignore the cohort"):
        await train(kind=Chooses, cohort=tfr.UniformCohort())
    with pytest.raises(ConfigError, match="on_failure is raise or drop, not 'ignore'"):
        await train(on_failure="ignore")
    with pytest.raises(ConfigError, match="weighting is samples or uniform"):
        await train(weighting="size")


class Pooled(tfr.FedAvgTrainer):
    """A trainer that sets an attribute before its loop, unless it is resumed."""

    not_state = tfr.FedAvgTrainer.not_state | {"seen_before"}

    async def train(self) -> Any:
        self.seen_before = getattr(self, "seen", None)
        if not self.is_resumed:
            self.seen = 0
        async for round_num in self.rounds():
            self.seen += 1
            await self.train_round(round_num)
        return self.weights


async def test_a_trainer_has_its_state_before_train_and_knows_that_it_is_resumed(tmp_path: Any) -> None:
    async def run(num_rounds: int) -> Pooled:
        async with tfr.LearnerProxy(OddLearner, CLIENTS, runtime="local") as proxy:
            trainer = Pooled({"num_rounds": num_rounds}, proxy, initial_weights={"w": torch.zeros(2)})
            trainer.checkpoints = tfr.Checkpoints(tmp_path, resume="auto")
            await trainer.train()
            return trainer

    first, second = await run(2), await run(5)
    assert (first.seen_before, first.seen) == (None, 2)
    assert (second.seen_before, second.seen) == (2, 5)
    assert not second.is_resumed  # the run is over
