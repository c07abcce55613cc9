"""Client evaluation: metrics of the clients' scores, its rounds, and what it refuses."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from typing import Any

import pytest
import torch

import torchfedrpc as tfr
from torchfedrpc.federation.client_evaluation import client_metrics


def scores(*accuracies: float, **more: Any) -> dict[str, dict[str, Any]]:
    return {f"client_{number}": {"accuracy": value, "num_samples": 1} for number, value in enumerate(accuracies)}


class Scored:
    """Scores a weight by its distance to the client's number; counts its evaluations."""

    def __init__(self, client_id: str) -> None:
        self.number = int(client_id.removeprefix("client_"))
        self.num_scores = 0

    def train_epoch(self, model_weights: Any, round_num: int, local_epochs: int) -> dict[str, Any]:
        weights = {"w": model_weights["w"] + 1}
        return {"model_weights": weights, "num_samples": 1, "train_loss": 0.0}

    def evaluate(self, **given: Any) -> Mapping[str, Any]:
        self.num_scores += 1
        if self.number == 9:
            raise RuntimeError("no camera")
        value = float(given["model_weights"]["w"]) if given else -1.0
        return {"loss": self.number + value, "num_samples": self.number}

    def count(self) -> int:
        return self.num_scores


class Recorder(tfr.Callback):
    """Records the metrics of the rounds."""

    def __init__(self) -> None:
        self.rounds: list[dict[str, float]] = []

    def on_round_end(self, run: tfr.Run, ended: tfr.RoundEnded) -> None:
        self.rounds.append(ended.metrics)


class NoWeights(tfr.AbstractFederationTrainer):
    """A trainer without global weights, which publishes nothing."""

    async def train(self) -> None:
        async for _ in self.rounds():
            pass


async def run(
    every: int, clients: list[str], *, trainer: type[Any] = tfr.FedAvgTrainer, **config: Any
) -> tuple[list[dict[str, float]], dict[str, int]]:
    """The metrics of the rounds, and the number of evaluations of each client."""
    async with tfr.LearnerProxy(Scored, clients, runtime="local") as proxy:
        given = {"initial_weights": {"w": torch.zeros(())}} if trainer is tfr.FedAvgTrainer else {}
        made = trainer({"num_rounds": 5, **config}, proxy, **given)
        recorder = Recorder()
        made.callbacks = [tfr.ClientEvaluation(every), recorder]
        await made.train()
        return recorder.rounds, dict(await proxy.clients().call("count"))


def test_metrics_are_mean_weighted_mean_worst_decile_and_spread() -> None:
    results = {
        "a": {"accuracy": 0.5, "loss": 3.0, "num_samples": 1},
        "b": {"accuracy": 1.0, "loss": 1.0, "num_samples": 3},
        "c": {"accuracy": 0.0, "loss": 0.0, "num_samples": 0},
    }
    assert client_metrics(results) == {
        "client_accuracy": 0.75,
        "client_accuracy_weighted": 0.875,
        "client_accuracy_worst_decile": 0.5,
        "client_accuracy_spread": 0.25,
        "client_loss": 2.0,
        "client_loss_weighted": 1.5,
        "client_loss_worst_decile": 3.0,
        "client_loss_spread": 1.0,
    }


@pytest.mark.parametrize(("num_clients", "num_worst"), [(1, 1), (9, 1), (10, 1), (19, 1), (20, 2), (35, 3)])
def test_the_worst_decile_is_a_tenth_of_the_clients_and_at_least_one(num_clients: int, num_worst: int) -> None:
    accuracies = [number / 64 for number in range(num_clients)]
    metrics = client_metrics(scores(*reversed(accuracies)))
    assert metrics["client_accuracy_worst_decile"] == sum(accuracies[:num_worst]) / num_worst


def test_a_diverged_loss_is_no_error() -> None:
    metrics = client_metrics({"a": {"loss": math.nan, "num_samples": 1}, "b": {"loss": math.inf, "num_samples": 1}})
    assert math.isnan(metrics["client_loss"])


@pytest.mark.parametrize(
    ("results", "message"),
    [
        ({"a": 0.5}, r"a: evaluate returned 0\.5: it must return a mapping with num_samples"),
        ({"a": {"accuracy": 0.5}}, r"a: evaluate returned .*num_samples"),
        ({"a": {"error": 0.5, "num_samples": 1}}, r"a: evaluate returned .*: it must have accuracy or loss"),
        ({**scores(0.5), "b": {"loss": 1, "num_samples": 1}}, r"client_0: .*: it must have accuracy and loss"),
        ({"a": {"accuracy": 0.0, "num_samples": 0}}, r"no client has samples to score: raise held_out"),
    ],
)
def test_results_without_scores_are_refused(results: Any, message: str) -> None:
    with pytest.raises(tfr.ConfigError, match=message):
        client_metrics(results)


async def test_clients_are_scored_after_the_first_round_and_each_nth() -> None:
    rounds, counts = await run(2, ["client_1", "client_3"])
    assert [metrics.get("client_loss") for metrics in rounds] == [3.0, 4.0, None, 6.0, 7.0]
    assert [metrics["train_loss"] for metrics in rounds] == [0.0] * 5
    assert counts == {"client_1": 4, "client_3": 4}


async def test_learners_score_their_own_models_where_the_trainer_has_no_weights() -> None:
    rounds, _ = await run(5, ["client_1", "client_3"], trainer=NoWeights)
    assert [metrics.get("client_loss") for metrics in rounds] == [1.0, None, None, None, 1.0]


async def test_a_failed_evaluation_ends_the_run_unless_failures_are_dropped(caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(tfr.GroupCallError, match="no camera") as failed:
        await run(1, ["client_1", "client_9"])
    assert "in ClientEvaluation.on_round_end, a callback of the run" in failed.value.__notes__
    with caplog.at_level(logging.WARNING):
        rounds, _ = await run(1, ["client_1", "client_9"], on_failure="drop")
    assert rounds[-1]["client_loss"] == 6.0
    assert "client_9 is left out of the evaluation: RuntimeError: no camera" in caplog.text
    with pytest.raises(tfr.GroupCallError, match="evaluate failed for all of client_9"):
        await run(1, ["client_9"], on_failure="drop")


@pytest.mark.parametrize("every", [0, -1, True, 1.5, "2"])
def test_a_number_of_rounds_below_1_is_refused(every: Any) -> None:
    with pytest.raises(tfr.ConfigError, match="evaluate_every must be a whole number of rounds of at least 1, not"):
        tfr.ClientEvaluation(every)
