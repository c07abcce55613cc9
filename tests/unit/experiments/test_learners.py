"""Learners of SCAFFOLD, FedBN and Ditto: what stays with the client, and what they refuse."""

from __future__ import annotations

import functools
import threading
import warnings
from typing import Any

import numpy as np
import pytest
import torch

import torchfedrpc as tfr
from torchfedrpc.experiments.experiment import run_experiment
from torchfedrpc.experiments.learners.classification import ClassificationLearner
from torchfedrpc.experiments.learners.ditto import DittoLearner
from torchfedrpc.experiments.training import build_model, copy_weights
from torchfedrpc.registry import get_learner

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
    name = trainer.partition(".")[0].replace("fedavg", "classification")
    with pytest.raises(
        tfr.ConfigError, match=rf"train_epoch: .*{message}.*; the bundled learner .* is learner={name}"
    ):
        await run_experiment(config, tmp_path)


async def test_a_personal_entry_that_is_everything_is_refused() -> None:
    weights = copy_weights(build_model(LOGISTIC, 0))
    async with tfr.LearnerProxy("fedbn", clients(LOGISTIC), runtime="local") as proxy:
        with pytest.raises(tfr.ConfigError, match="matches the whole model, so no entry is global"):
            await proxy.train_epoch("a", model_weights=weights, personal=["*"])
        trainer = tfr.FedBNTrainer({"num_rounds": 1, "personal": "*.bias"}, proxy, initial_weights=weights)
        assert trainer.local_settings()["personal"] == ["*.bias"]  # a text is one pattern


async def test_fedbn_leaves_the_personal_entries_of_the_global_weights_to_the_bit() -> None:
    model = build_model(MODEL, 0)
    torch.manual_seed(0)
    noise = {name: torch.rand_like(value) for name, value in model.state_dict().items() if value.is_floating_point()}
    weights = {name: value + noise.get(name, 0) for name, value in copy_weights(model).items()}
    buffers = [name for name, _ in model.named_buffers()]
    given = {
        name: one
        for name, share in (("a", 37), ("b", 41), ("c", 53))
        for one in clients(MODEL, range(share)).values()
    }
    async with tfr.LearnerProxy("fedbn", given, runtime="local") as proxy:
        trainer = tfr.FedBNTrainer({"num_rounds": 3}, proxy, initial_weights=weights, buffers=buffers)
        final = await trainer.train()
        assert final is not None
        for name in trainer.personal_names():
            assert torch.equal(final[name], weights[name]), name


class OpenDitto(DittoLearner):
    """Ditto's learner, whose state can be seen."""

    def get_state(self) -> dict[str, Any]:
        return self.state_dict()


async def test_a_call_that_fails_leaves_the_state_of_a_learner_as_it_was() -> None:
    weights = copy_weights(build_model(MODEL, 0))
    async with tfr.LearnerProxy(OpenDitto, clients(keep_weights=True), runtime="local") as proxy:
        arguments: dict[str, Any] = {"model_weights": weights, "compression": "top_k", "compression_ratio": 0.1}
        await proxy.train_epoch("a", penalty=0.1, **arguments)
        before = await proxy.client("a").get_state()
        with pytest.raises(FloatingPointError, match="a has diverged"):
            await proxy.train_epoch("a", penalty=1e30, personal_epochs=9, **arguments)
        after = await proxy.client("a").get_state()
        for part in ("weights", "residual", "personal"):
            assert before[part].keys() == after[part].keys()
            for name, value in before[part].items():
                assert torch.equal(value, after[part][name]), (part, name)


class Proximal(ClassificationLearner):
    """FedProx's term as a hook of one's own."""

    def gradient_hooks(self, model: Any) -> list[Any]:
        anchors = [parameter.detach().clone() for parameter in model.parameters()]

        def add(parameters: Any) -> None:
            for parameter, anchor in zip(parameters, anchors, strict=True):
                parameter.grad.add_(parameter.detach() - anchor, alpha=0.3)

        return [add]


async def test_hooks_of_a_subclass_are_called_before_each_step() -> None:
    weights = copy_weights(build_model(LOGISTIC, 0))
    found = []
    for learner, settings in ((Proximal, {}), ("classification", {"proximal_mu": 0.3}), ("classification", {})):
        async with tfr.LearnerProxy(learner, clients(LOGISTIC), runtime="local") as proxy:
            found.append((await proxy.train_epoch("a", model_weights=weights, **settings))["model_weights"])
    for name in weights:
        assert torch.equal(found[0][name], found[1][name])
    assert any(not torch.equal(found[0][name], found[2][name]) for name in weights)


@pytest.mark.parametrize(
    ("kind", "learner", "config"),
    [
        (tfr.ScaffoldTrainer, "scaffold", {}),
        (tfr.DittoTrainer, "ditto", {}),
        (tfr.FedBNTrainer, "fedbn", {}),
    ],
)
async def test_stateless_learners_are_refused_where_an_algorithm_needs_state(
    kind: Any, learner: str, config: Any
) -> None:
    stateless = functools.partial(get_learner(learner), keep_weights=False)
    stateless.stateless = True  # type: ignore[attr-defined]
    async with tfr.LearnerProxy(stateless, clients(), runtime="local") as proxy:
        with pytest.raises(tfr.ConfigError, match=f"the learners of {kind.__name__} keep state from round to round"):
            kind({"num_rounds": 1, **config}, proxy, initial_weights=copy_weights(build_model(MODEL, 0)))


class Counting(torch.nn.Module):
    """A model with state that its state dict lacks."""

    seen: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.num_steps = 0
        self.register_buffer("seen", torch.zeros(()), persistent=False)
        self.flat = torch.nn.Flatten()
        self.linear = torch.nn.Linear(64, 10)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        self.num_steps += 1
        self.seen += 1
        logits: torch.Tensor = self.linear(self.flat(inputs)) / (1 + 0.1 * self.num_steps + 0.1 * self.seen)
        return logits


class Normed(torch.nn.Module):
    """A model that cannot be copied, since a weight is the result of a computation."""

    def __init__(self) -> None:
        super().__init__()
        self.flat = torch.nn.Flatten()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.linear = torch.nn.utils.weight_norm(torch.nn.Linear(64, 10))

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.linear(self.flat(inputs))
        return logits


class Lambda(torch.nn.Module):
    """A model whose forward pass is a function that refers to it, and which has a lock."""

    def __init__(self) -> None:
        super().__init__()
        self.lock = threading.Lock()
        self.flat = torch.nn.Flatten()
        self.linear = torch.nn.Linear(64, 10)
        self.head = lambda inputs: self.linear(self.flat(inputs))

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.head(inputs)
        return logits


async def test_models_with_functions_of_themselves_are_trained() -> None:
    recipe = {"_target_": f"{__name__}.Lambda"}
    weights = copy_weights(build_model(recipe, 0, [__name__]))
    runtime = {"execution_mode": "local", "trusted_modules": [__name__]}
    async with tfr.LearnerProxy("classification", clients(recipe), runtime=runtime) as proxy:
        result = await proxy.train_epoch("a", model_weights=weights)
    assert not torch.equal(result["model_weights"]["linear.weight"], weights["linear.weight"])


@pytest.mark.parametrize("model", ["Counting", "Normed"])
async def test_models_are_new_in_each_call(model: str) -> None:
    recipe = {"_target_": f"{__name__}.{model}"}
    weights = copy_weights(build_model(recipe, 0, [__name__]))
    runtime = {"execution_mode": "local", "trusted_modules": [__name__]}

    async def losses(count: int) -> list[float]:
        given = clients(recipe) | {"b": clients(recipe)["a"]}
        async with tfr.LearnerProxy("classification", given, runtime=runtime) as proxy:
            for _ in range(count):
                await proxy.evaluate("b", model_weights=weights)
            result = await proxy.train_epoch("a", model_weights=weights)
            return [result["train_loss"], (await proxy.evaluate("a", model_weights=weights))["loss"]]

    assert await losses(0) == await losses(3)


class Tied(torch.nn.Module):
    """A model whose first and last layers share a weight."""

    def __init__(self) -> None:
        super().__init__()
        self.flat = torch.nn.Flatten()
        self.first = torch.nn.Linear(64, 64)
        self.last = torch.nn.Linear(64, 64, bias=False)
        self.last.weight = self.first.weight

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.last(self.first(self.flat(inputs)).relu())
        return logits


@pytest.mark.parametrize(
    ("kind", "learner", "config"),
    [
        (tfr.FedNovaTrainer, "classification", {}),
        (tfr.FedAvgTrainer, "classification", {"compression": "int8"}),
        (tfr.ScaffoldTrainer, "scaffold", {}),
    ],
)
async def test_parameters_that_are_shared_stay_equal(kind: Any, learner: str, config: Any) -> None:
    recipe = {"_target_": f"{__name__}.Tied"}
    weights = copy_weights(build_model(recipe, 0, [__name__]))
    runtime = {"execution_mode": "local", "trusted_modules": [__name__]}
    given = clients(recipe, range(40)) | {"b": clients(recipe, range(40, 90))["a"]}
    async with tfr.LearnerProxy(learner, given, runtime=runtime) as proxy:
        trainer = kind({"num_rounds": 3, "local_epochs": 2, **config}, proxy, initial_weights=weights)
        final = await trainer.train()
    assert torch.allclose(final["first.weight"], final["last.weight"], atol=1e-6)
    assert not torch.equal(final["first.weight"], weights["first.weight"])


async def test_the_order_of_the_global_weights_does_not_matter_to_top_k() -> None:
    weights = copy_weights(build_model(MODEL, 0))
    found = []
    for initial in (weights, dict(sorted(weights.items(), reverse=True))):
        async with tfr.LearnerProxy("classification", clients(), runtime="local") as proxy:
            config = {"num_rounds": 3, "compression": "top_k", "compression_ratio": 0.3}
            found.append(await tfr.FedAvgTrainer(config, proxy, initial_weights=initial).train())
    for name in weights:
        assert found[0] is not None
        assert found[1] is not None
        assert torch.allclose(found[0][name], found[1][name], atol=1e-6), name
