"""Learners of SCAFFOLD, FedBN and Ditto: what stays with the client, and what they refuse."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import torchfedrpc as tfr
from torchfedrpc.experiments.experiment import run_experiment
from torchfedrpc.experiments.training import build_model, copy_weights

DATASET = {"_target_": "torchfedrpc.experiments.data.synthetic.synthetic", "num_samples": 120}
MODEL = {"_target_": "torchfedrpc.experiments.models.ConvNet", "channels": [2, 3], "batch_norm": True}
LOGISTIC = {"_target_": "torchfedrpc.experiments.models.LogisticRegression"}


def clients(model: dict[str, Any] = MODEL, indices: Any = range(48), **settings: Any) -> dict[str, dict[str, Any]]:
    return {"a": {"dataset": DATASET, "model": model, "indices": np.array(indices, dtype=np.int64), **settings}}


async def test_batch_normalisation_stays_with_the_client() -> None:
    weights = copy_weights(build_model(MODEL, 0))
    async with tfr.LearnerProxy("fedbn", clients(), runtime="local") as proxy:
        result = await proxy.train_epoch("a", model_weights=weights, personal=[])
        own = await proxy.client("a").get_personal_weights()
        assert {name.split(".")[1] for name in own} == {"1", "5"}
        assert {name.rpartition(".")[2] for name in own} >= {"weight", "bias", "running_mean", "running_var"}
        for name, value in result["model_weights"].items():
            assert name not in own or torch.equal(value, weights[name]), name
            assert name not in own or not torch.equal(value, own[name]), name
        assert not torch.equal(result["model_weights"]["head.weight"], weights["head.weight"])
        scored = await proxy.evaluate("a", model_weights=result["model_weights"])
        merged = {**result["model_weights"], **own}
    async with tfr.LearnerProxy("classification", clients(), runtime="local") as proxy:
        assert await proxy.evaluate("a", model_weights=merged) == scored


async def test_other_entries_may_stay_by_patterns_and_none_is_refused() -> None:
    weights = copy_weights(build_model(MODEL, 0))
    async with tfr.LearnerProxy("fedbn", clients(), runtime="local") as proxy:
        await proxy.train_epoch("a", model_weights=weights, personal=["head.*"])
        assert set(await proxy.client("a").get_personal_weights()) == {"head.weight", "head.bias"}
        with pytest.raises(tfr.ConfigError, match=r"FedBN keeps heads\.\* at the clients, and the model has none"):
            await proxy.train_epoch("a", model_weights=weights, personal=["heads.*"])
    async with tfr.LearnerProxy("fedbn", clients(LOGISTIC), runtime="local") as proxy:
        with pytest.raises(tfr.ConfigError, match=r"batch normalisation .* model\.batch_norm=true"):
            await proxy.train_epoch("a", model_weights=copy_weights(build_model(LOGISTIC, 0)), personal=[])


async def test_a_client_without_samples_leaves_its_control_variate() -> None:
    weights = copy_weights(build_model(LOGISTIC, 0))
    control = {name: torch.ones_like(value) for name, value in weights.items()}
    async with tfr.LearnerProxy("scaffold", clients(LOGISTIC, []), runtime="local") as proxy:
        result = await proxy.train_epoch("a", model_weights=weights, server_control=control)
    assert result["num_samples"] == 0
    assert not any(value.any() for value in result["control_change"].values())


async def test_dittos_personal_model_is_near_the_global_one_by_its_penalty() -> None:
    weights = copy_weights(build_model(LOGISTIC, 0))

    async def distance(penalty: float) -> float:
        async with tfr.LearnerProxy("ditto", clients(LOGISTIC), runtime="local") as proxy:
            await proxy.train_epoch("a", model_weights=weights, penalty=penalty, personal_epochs=20)
            own = await proxy.client("a").get_personal_weights()
        return float(sum((own[name] - value).square().sum() for name, value in weights.items()))

    assert await distance(5.0) < 0.5 * await distance(0.0)


@pytest.mark.parametrize(
    ("trainer", "learner", "message"),
    [
        ("scaffold.ScaffoldTrainer", "classification.ClassificationLearner", "server_control"),
        ("fedbn.FedBNTrainer", "classification.ClassificationLearner", "personal"),
        ("ditto.DittoTrainer", "classification.ClassificationLearner", "penalty"),
        ("fedavg.FedAvgTrainer", "scaffold.ScaffoldLearner", "server_control"),
        ("fedavg.FedAvgTrainer", "fedbn.FedBNLearner", "personal"),
        ("fedavg.FedAvgTrainer", "ditto.DittoLearner", "penalty"),
    ],
)
async def test_a_learner_of_another_algorithm_is_refused_before_the_first_round(
    trainer: str, learner: str, message: str, tmp_path: Any
) -> None:
    from torchfedrpc.config import RuntimeConfig
    from torchfedrpc.experiments.experiment_config import ExperimentConfig

    config = ExperimentConfig.of(
        {
            "seed": 0,
            "runtime": RuntimeConfig(execution_mode="local", num_clients=2),
            "dataset": DATASET,
            "partition": {"_target_": "torchfedrpc.experiments.data.partition.iid"},
            "model": LOGISTIC,
            "learner": {"_target_": f"torchfedrpc.experiments.learners.{learner}"},
            "trainer": {"_target_": f"torchfedrpc.federation.algorithms.{trainer}", "num_rounds": 1},
        }
    )
    with pytest.raises(tfr.ConfigError, match=rf"train_epoch: .*{message}"):
        await run_experiment(config, tmp_path)
