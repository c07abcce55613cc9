"""What trainers, learners, datasets, models, partitions and aggregators must look like."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import torchfedrpc as tfr
from torchfedrpc.config import RuntimeConfig
from torchfedrpc.errors import ConfigError
from torchfedrpc.experiments import experiment
from torchfedrpc.experiments.data.samples import Samples, TrainTest
from torchfedrpc.experiments.experiment import run_experiment
from torchfedrpc.experiments.experiment_config import ExperimentConfig
from torchfedrpc.experiments.options import option_of
from torchfedrpc.experiments.protocol_checks import (
    check_aggregator,
    check_dataset,
    check_final_weights,
    check_methods,
    check_model,
    check_partition,
    check_signature,
    check_trainer,
    given,
    shared_samples,
    unheld_classes,
)
from torchfedrpc.federation.algorithms.fedavg import FedAvgTrainer


@pytest.fixture(autouse=True)
def _no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """matplotlib keeps fonts open."""
    monkeypatch.setattr(experiment, "_draw", lambda *_: None)


FEDAVG = {"_target_": "torchfedrpc.federation.algorithms.fedavg.FedAvgTrainer", "num_rounds": 1}


def recipe(entry: Any, **settings: Any) -> dict[str, Any]:
    """A recipe of a class or function of this module."""
    return {"_target_": f"{entry.__module__}.{entry.__qualname__}", **settings}


def samples(num_samples: int = 10) -> Samples:
    return Samples(torch.zeros(num_samples, 1, 8, 8), torch.arange(num_samples) % 10)


def with_groups(groups: Any) -> Samples:
    return Samples(torch.zeros(10, 1, 8, 8), torch.arange(10), groups)


class NoTrainer:
    async def train(self) -> None: ...


class Unfinished(tfr.AbstractFederationTrainer): ...


class PlainTrain(tfr.AbstractFederationTrainer):
    def train(self) -> Any: ...


class OtherArguments(FedAvgTrainer):
    def __init__(self, config: Any, proxy: Any, strength: float) -> None: ...


NOT_CALLABLE = 3


@pytest.mark.parametrize(
    ("trainer", "message"),
    [
        (NoTrainer, "derive its class from tfr.FedAvgTrainer or tfr.AbstractFederationTrainer"),
        (PlainTrain, "train is not async: write async def train(self)"),
        (Unfinished, "train is missing: write async def train(self), which returns the final weights"),
        (OtherArguments, "missing a required argument: 'strength'; it is called with (config, learner_proxy), and"),
    ],
)
def test_trainers_are_checked(trainer: type, message: str) -> None:
    with pytest.raises(
        ConfigError, match=re.escape(f"trainer {trainer.__module__}.{trainer.__qualname__}: {message}")
    ):
        check_trainer(recipe(trainer))


def test_messages_use_the_registered_name(monkeypatch: pytest.MonkeyPatch) -> None:
    from torchfedrpc.registry import trainers

    monkeypatch.setattr(trainers, "_entries", {**trainers._entries, "plain": PlainTrain})
    with pytest.raises(ConfigError, match=r"^trainer plain: train is not async"):
        check_trainer(recipe(PlainTrain))


def test_targets_that_are_no_classes_are_refused() -> None:
    with pytest.raises(ConfigError, match="a class or function is expected, not 3"):
        check_signature("learner", {"_target_": f"{__name__}.NOT_CALLABLE"})


class NoTraining:
    def __init__(self, client_id: str, lerning_rate: float = 0.1) -> None: ...

    def train_epochs(self) -> None: ...


class Narrow(NoTraining):
    def train_epoch(self, model_weights: Any, round_num: int, local_epochs: int) -> None: ...


def test_learners_are_checked_against_their_settings() -> None:
    check_signature("learner", recipe(NoTraining, lerning_rate=1))
    with pytest.raises(ConfigError, match=r"got an unexpected keyword argument 'learning_rate'; .*lerning_rate"):
        check_signature("learner", recipe(NoTraining, learning_rate=1))


async def test_learners_are_checked_against_the_calls_of_bundled_trainers() -> None:
    async with tfr.LearnerProxy(NoTraining, ["one"]) as proxy:
        fedavg = FedAvgTrainer({"num_rounds": 1}, proxy)
        fedprox = tfr.FedProxTrainer({"num_rounds": 1, "mu": 0.1}, proxy)
    with pytest.raises(ConfigError, match=r"train_epoch is missing, .* \(did you mean 'train_epochs'\?\)"):
        check_methods(recipe(NoTraining), fedavg)
    check_methods(recipe(Narrow), fedavg)
    with pytest.raises(ConfigError, match=r"train_epoch: got an unexpected keyword argument 'proximal_mu'; .*mu="):
        check_methods(recipe(Narrow), fedprox)


def dataset() -> None: ...


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ((samples(), samples()), "tfr.TrainTest(train, test) is expected, not a tuple"),
        (TrainTest(samples(), [1]), "test: tfr.Samples(inputs, labels) is expected, not a list"),  # type: ignore[arg-type]
        (TrainTest(samples(), Samples([], [])), "test.inputs: a tensor is expected, not a list"),  # type: ignore[arg-type]
        (
            TrainTest(samples(), Samples(torch.zeros(3, 2), torch.zeros(3))),
            "test.labels: int64 of shape [num_samples] is expected, not torch.float32 of shape [3]",
        ),
        (
            TrainTest(Samples(torch.zeros(3, 2), torch.zeros(4, dtype=torch.int64)), samples()),
            "train: a label for each input is expected, and at least one; it has 3 inputs and 4 labels",
        ),
        (
            TrainTest(Samples(torch.zeros(2, 2), torch.tensor([0, -1])), samples()),
            "train.labels: classes are numbered from 0, and it has -1",
        ),
        (TrainTest(with_groups([0, 1]), samples()), "train.groups: a tensor is expected, not a list"),
        (
            TrainTest(samples(), with_groups(torch.zeros(9, dtype=torch.int64))),
            "test.groups: int64 of shape [10], one for each sample, is expected, not torch.int64 of shape [9]",
        ),
        (
            TrainTest(with_groups(torch.zeros(10)), samples()),
            "train.groups: int64 of shape [10], one for each sample, is expected, not torch.float32 of shape [10]",
        ),
        (
            TrainTest(with_groups(torch.arange(10) - 1), samples()),
            "train.groups: numbers from 0 are expected, and it has -1",
        ),
    ],
)
def test_datasets_are_checked(data: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(f"dataset {__name__}.dataset: {message}")):
        check_dataset(recipe(dataset), data)


def partition(num_clients: int) -> None: ...


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({}, "a list of index arrays is expected, not a dict"),
        ([[0], [1], [2]], "it returned 3 parts for 2 clients: return one for each"),
        ([[0], [0.5]], "part 1: whole numbers of shape [num_samples] are expected, not float64 of shape [1]"),
        ([[0], [[1]]], "part 1: whole numbers of shape [num_samples] are expected, not int64 of shape [1, 1]"),
        ([[0], [-1, 10]], "part 1: indices from 0 to 9 are expected, and it has -1 to 10"),
        (
            [[0], []],
            "part 1 has no samples: give each client at least one, or have fewer clients, by runtime.num_clients",
        ),
    ],
)
def test_partitions_are_checked(parts: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(f"partition {__name__}.partition: {message}")):
        check_partition(recipe(partition), parts, 2, 10)


def test_partitions_may_be_of_any_whole_numbers() -> None:
    checked = check_partition(recipe(partition), [[2], torch.tensor([3, 4])], 2, 10)
    assert [part.tolist() for part in checked] == [[2], [3, 4]]
    assert {part.dtype for part in checked} == {np.dtype(np.int64)}


def test_partitions_take_labels_and_number_of_clients() -> None:
    with pytest.raises(ConfigError, match="got an unexpected keyword argument 'labels'"):
        check_signature("partition", recipe(partition))


def named_groups(labels: Any, num_clients: int, groups: Any, size: int = 2) -> list[Any]:
    return [np.flatnonzero(groups == number) for number in range(num_clients)]


def any_settings(labels: Any, num_clients: int, **settings: Any) -> list[Any]:
    assert not settings
    return [np.arange(len(labels))] * num_clients


def test_partitions_receive_groups_if_they_name_them() -> None:
    values = {"labels": 1, "num_clients": 2, "groups": 3}
    assert given("partition", named_groups, values) == values
    assert given("partition", any_settings, values) == {"labels": 1, "num_clients": 2}
    assert option_of("partition", named_groups) == {"_target_": f"{__name__}.named_groups", "size": 2}


def test_classes_that_no_client_has_are_told_with_what_they_cost() -> None:
    labels, parts = np.array([0, 1, 2, 2]), [np.array([0, 1])]
    assert unheld_classes(parts, labels, np.array([0, 1, 1])) is None
    assert unheld_classes(parts, labels, np.array([0, 1, 2, 3])) == (
        "no client has samples of classes 2, 3, which 2 of 4 test samples have: the test accuracy is at most 0.500"
    )


class Wide(nn.Module):
    def forward(self, inputs: Tensor) -> Any:
        return (inputs,)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (
            nn.Linear(3, 10),
            "it does not take the inputs of dataset .*, torch.float32 of shape .batch, 1, 8, 8. .*: mat1",
        ),
        (Wide(), r"logits of shape \[batch, num_classes\] are expected, not a tuple"),
        (nn.Flatten(0), r"logits of shape \[batch, num_classes\] are expected, not shape \[128\]"),
        (
            nn.Sequential(nn.Flatten(), nn.Linear(64, 5)),
            r"10 classes, .* returns 5 logits \(to fit: model.num_outputs\)",
        ),
    ],
)
def test_models_are_checked(model: nn.Module, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_model(recipe(Wide, num_outputs=5), recipe(dataset), model, TrainTest(samples(), samples()))
    assert model.training


def test_labels_that_are_not_numbered_from_0_are_named_where_a_model_has_too_few_logits() -> None:
    ones = Samples(torch.zeros(10, 64), torch.arange(10) + 1)
    with pytest.raises(ConfigError, match=r"its labels are 1 to 10: number the classes from 0$"):
        check_model(recipe(Wide), recipe(dataset), nn.Linear(64, 10), TrainTest(ones, ones))


class NoCall:
    pass


def median(models: Any, num_samples: Any) -> Any:
    return {name: torch.stack([model[name] for model in models]).median(dim=0).values for name in models[0]}


def one_argument(models: Any) -> Any: ...


class TakesNoAggregator(tfr.AbstractFederationTrainer):
    async def train(self) -> Any: ...


def test_aggregators_are_checked() -> None:
    check_aggregator(recipe(median), FEDAVG)
    with pytest.raises(ConfigError, match=r"__call__ is missing: write def __call__\(self, models, num_samples\)"):
        check_aggregator(recipe(NoCall), FEDAVG)
    with pytest.raises(ConfigError, match=r"one_argument: too many positional arguments"):
        check_aggregator(recipe(one_argument), FEDAVG)
    with pytest.raises(
        ConfigError, match=r"TakesNoAggregator takes no aggregator, and would ignore aggregator .*median"
    ):
        check_aggregator(recipe(median), recipe(TakesNoAggregator))
    check_aggregator({"_target_": "torchfedrpc.federation.aggregation.Mean"}, recipe(TakesNoAggregator))


def test_final_weights_are_checked() -> None:
    with pytest.raises(ConfigError, match=r"train\(\) must return the final weights, a state dict; .* a NoneType"):
        check_final_weights(recipe(TakesNoAggregator), None, nn.Linear(1, 1))
    with pytest.raises(ConfigError, match=r"not those of the model: only one of them has bias, scale"):
        check_final_weights(recipe(TakesNoAggregator), {"weight": 1, "scale": 1}, nn.Linear(1, 1))


# Whole experiments.


class Forgetful:
    def __init__(self, client_id: str) -> None: ...

    def train_epoch(self, model_weights: Any, round_num: int, local_epochs: int) -> dict[str, Any]:
        return {"model_weights": model_weights, "train_loss": 0.0}


class OneRound(tfr.AbstractFederationTrainer):
    """It takes none of the keyword arguments."""

    async def train(self) -> Any:
        async for round_num in self.rounds():
            results = await self.learner_proxy.clients().train_epoch(model_weights={}, round_num=0, local_epochs=1)
            assert len(results) == 2
            self.learner_proxy.publish(tfr.RoundEnded(round_num, self.num_rounds, {"train_loss": 2.0}))
        return {"linear.weight": torch.zeros(10, 64), "linear.bias": torch.zeros(10)}


def config(**values: Any) -> ExperimentConfig:
    of = "torchfedrpc.experiments.{}".format
    return ExperimentConfig.of(
        {
            "seed": 0,
            "runtime": RuntimeConfig(num_clients=2),
            "dataset": {"_target_": of("data.synthetic.synthetic"), "num_samples": 100},
            "partition": {"_target_": of("data.partition.iid")},
            "model": {"_target_": of("models.LogisticRegression")},
            "learner": {"_target_": of("learners.classification.ClassificationLearner")},
            "trainer": FEDAVG,
            **values,
        }
    )


def grouped() -> TrainTest:
    """Clients with one class each, and a class that only the test set has."""
    labels = torch.arange(20) % 2
    return TrainTest(
        Samples(torch.zeros(20, 64), labels, 1 - labels), Samples(torch.zeros(20, 64), torch.arange(20) % 4)
    )


async def test_an_experiment_gives_groups_to_the_partition_and_tells_classes_without_a_client(tmp_path: Path) -> None:
    printed = io.StringIO()
    natural = {"_target_": "torchfedrpc.experiments.data.partition.natural"}
    runtime = RuntimeConfig(num_clients=2, trusted_modules=[__name__])
    await run_experiment(
        config(dataset=recipe(grouped), partition=natural, runtime=runtime), tmp_path, stream=printed
    )
    clients = [json.loads(line)["classes"] for line in (tmp_path / "clients.jsonl").read_text().splitlines()]
    assert clients == [{"0": 0, "1": 10}, {"0": 10, "1": 0}]
    assert "no client has samples of classes 2, 3, which 10 of 20 test samples have" in printed.getvalue()


async def test_an_experiment_of_a_natural_partition_without_groups_names_what_has_some(tmp_path: Path) -> None:
    natural = {"_target_": "torchfedrpc.experiments.data.partition.natural"}
    with pytest.raises(ConfigError, match=r"partition=natural .* has none: use one .*dataset=fedprox_synthetic"):
        await run_experiment(config(partition=natural), tmp_path)


async def test_results_that_lack_the_number_of_samples_name_it_and_the_client(tmp_path: Path) -> None:
    with pytest.raises(tfr.GroupCallError) as failed:
        await run_experiment(config(learner=recipe(Forgetful)), tmp_path)
    assert "the learner's result has no 'num_samples', only 'model_weights', 'train_loss'" in str(
        failed.value.exceptions[0]
    )


async def test_trainer_and_learner_receive_the_arguments_that_they_name(tmp_path: Path) -> None:
    trainer = recipe(OneRound, num_rounds=1)
    assert await run_experiment(config(trainer=trainer, learner=recipe(Forgetful)), tmp_path) == pytest.approx(0.1)
    assert '"train_loss": 2.0' in (tmp_path / "history.jsonl").read_text()


class WithHistory(tfr.FedAvgTrainer):
    """A trainer whose constructor takes no history, and which keeps one of its own."""

    def __init__(self, config: Any, learner_proxy: tfr.LearnerProxy, *, initial_weights: Any) -> None:
        super().__init__(config, learner_proxy, initial_weights=initial_weights)
        self.history: list[Any] = []

    async def train_round(self, round_num: int) -> dict[str, float]:
        self.history.append("own")
        return await super().train_round(round_num)


async def test_each_round_is_one_line_whatever_the_trainer_keeps(tmp_path: Path) -> None:
    await run_experiment(config(trainer=recipe(WithHistory, num_rounds=2)), tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "history.jsonl").read_text().splitlines()]
    assert [line["round"] for line in lines] == [0, 1]
    assert all(line["train_loss"] > 0 for line in lines)


class WithoutWeights(tfr.FedAvgTrainer):
    def __init__(self, config: Any, learner_proxy: tfr.LearnerProxy) -> None:
        super().__init__(config, learner_proxy)


async def test_a_constructor_that_drops_the_initial_weights_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^trainer .*WithoutWeights: it has no initial weights: let its"):
        await run_experiment(config(trainer=recipe(WithoutWeights, num_rounds=1)), tmp_path)


class WrongStep(tfr.FedAvgTrainer):
    def step(self, aggregate: Any) -> Any:
        return None


async def test_a_step_that_returns_no_weights_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^WrongStep\.step\(\) returned a NoneType: it must return the new global"):
        await run_experiment(config(trainer=recipe(WrongStep, num_rounds=1)), tmp_path)


@pytest.mark.parametrize("kind", ["dataset", "model"])
async def test_an_unknown_setting_of_data_and_model_is_refused_by_name(kind: str, tmp_path: Path) -> None:
    settings = {**getattr(config(), kind), "num_smaples": 3}
    with pytest.raises(ConfigError, match=rf"^{kind}.*num_smaples"):
        await run_experiment(config(**{kind: settings}), tmp_path)


class Trimming:
    """An aggregator with a state."""

    def __init__(self, fraction: float = 0.5) -> None:
        self.num_calls = 0
        self.fraction = fraction

    def __call__(self, models: Any, num_samples: Any) -> Any:
        assert list(num_samples) == [40, 40]
        self.num_calls += 1
        return {name: tensor * self.fraction for name, tensor in models[0].items()}


class Ignoring(FedAvgTrainer):
    async def aggregate_weights(self, weights_list: Any, num_samples: Any = None) -> Any:
        return weights_list[0]


async def test_aggregators_may_be_functions_or_objects_with_settings_and_a_state(tmp_path: Path) -> None:
    await run_experiment(config(aggregator=recipe(median)), tmp_path / "median")
    await run_experiment(config(aggregator=recipe(Trimming, fraction=0.0)), tmp_path / "trimming")
    weights = torch.load(tmp_path / "trimming" / "model.pt", weights_only=True)
    assert not any(tensor.any() for tensor in weights.values())
    async with tfr.LearnerProxy(Forgetful, ["one"]) as proxy:
        counting = Trimming()
        counting.num_calls = 5
        states = FedAvgTrainer({}, proxy, aggregator=counting).state_dict()["states"]
        assert states["_aggregator_state"]["attributes"]["num_calls"] == 5
        for made in (median, None):
            states = FedAvgTrainer({}, proxy, aggregator=made).state_dict()["states"]
            assert states["_aggregator_state"]["attributes"] == {}
        with pytest.raises(ConfigError, match="Ignoring aggregates by its own aggregate_weights, and would ignore"):
            Ignoring({}, proxy, aggregator=median)


class Standing(FedAvgTrainer):
    def step(self, aggregate: Any) -> Any:
        assert self.weights is not None
        assert aggregate["linear.bias"].any()
        return {name: tensor + 1 for name, tensor in self.weights.items()}


async def test_a_trainer_makes_the_new_weights_of_the_aggregate(tmp_path: Path) -> None:
    for aggregator in (None, recipe(median)):
        await run_experiment(config(trainer=recipe(Standing, num_rounds=2), aggregator=aggregator), tmp_path)
        weights = torch.load(tmp_path / "model.pt", weights_only=True)
        assert all(tensor.unique().tolist() == [2.0] for tensor in weights.values())


def nothing(models: Any, num_samples: Any) -> None: ...


async def test_aggregators_that_return_no_state_dict_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"returned a NoneType: it must return a state dict with the names"):
        await run_experiment(config(aggregator=recipe(nothing)), tmp_path)


class Summing:
    """An aggregator that is formed on the workers, without a loss."""

    def __call__(self, models: Any, num_samples: Any) -> Any:
        raise AssertionError

    def reducer(self) -> tfr.Sum:
        return tfr.Sum(("model_weights",))


class Counting(Summing):
    def reducer(self) -> tfr.Sum:
        return tfr.Sum("num_samples")


async def test_a_reducer_without_weights_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"the reducer of the aggregator .* made a int: it must make a mapping with"
    ):
        await run_experiment(config(aggregator=recipe(Counting)), tmp_path)


async def test_a_reducing_aggregator_is_formed_on_the_workers(tmp_path: Path) -> None:
    await run_experiment(config(aggregator=recipe(Summing)), tmp_path)
    assert '"train_loss": null' in (tmp_path / "history.jsonl").read_text()


# Options of hydra's groups.


class Tuned(FedAvgTrainer):
    settings = {"mu": 0.1}


class TunedMore(Tuned):
    settings = {"nu": 0.2}


class OwnLoop(tfr.AbstractFederationTrainer):
    settings = {"patience": 3}

    async def train(self) -> Any: ...


class OwnLearner:
    def __init__(
        self, client_id: str, *, indices: Any, seed: int, rate: float, layers: tuple[int, int] = (1, 2)
    ) -> None: ...


class SameConstructor(tfr.ClassificationLearner): ...


class MoreArguments(tfr.ClassificationLearner):
    def __init__(self, client_id: str, *, extra: int = 1, **others: Any) -> None: ...


def noisy(scale: float = 1.0, seed: int = 7, draw: Callable[..., Any] = torch.randn) -> None: ...


def trimmed(models: Any, num_samples: Any, fraction: float = 0.1) -> None: ...


@pytest.mark.parametrize(
    ("kind", "entry", "option"),
    [
        (
            "trainer",
            Tuned,
            {
                "defaults": ["fedavg", "_self_"],
                **tfr.FedAvgTrainer.settings,
                "mu": 0.1,
            },
        ),
        (
            "trainer",
            TunedMore,
            {
                "defaults": ["fedavg", "_self_"],
                **tfr.FedAvgTrainer.settings,
                "mu": 0.1,
                "nu": 0.2,
            },
        ),
        ("trainer", OwnLoop, {"num_rounds": 20, "clients_per_round": None, "seed": "${seed}", "patience": 3}),
        ("learner", OwnLearner, {"rate": "???", "layers": [1, 2]}),
        ("learner", SameConstructor, {"defaults": ["classification", "_self_"]}),
        ("learner", MoreArguments, {"defaults": ["classification", "_self_"], "extra": 1}),
        ("dataset", noisy, {"scale": 1.0, "seed": "${seed}"}),
        ("aggregator", trimmed, {"fraction": 0.1}),
        ("aggregator", Trimming, {"fraction": 0.5}),
    ],
)
def test_options_have_the_settings_with_their_defaults(kind: str, entry: Any, option: dict[str, Any]) -> None:
    target = {"_target_": f"{__name__}.{entry.__qualname__}"}
    assert option_of(kind, entry) == {**target, **option}


def test_settings_of_a_class_complete_a_mapping() -> None:
    assert TunedMore.all_settings() == {
        **tfr.FedAvgTrainer.settings,
        "mu": 0.1,
        "nu": 0.2,
    }


async def test_a_trainer_has_its_settings_without_the_command() -> None:
    async with tfr.LearnerProxy(Forgetful, ["one"]) as proxy:
        trainer = TunedMore({"mu": 0.5}, proxy)
    assert (trainer.config.mu, trainer.config.nu) == (0.5, 0.2)


async def test_settings_that_a_bundled_trainer_would_ignore_are_refused(tmp_path: Path) -> None:
    trainer = recipe(FedAvgTrainer, num_rounds=1, mu=0.1)
    with pytest.raises(ConfigError, match=r"has no setting 'mu'.*, and would ignore it"):
        await run_experiment(config(trainer=trainer), tmp_path)


async def test_a_run_with_personal_models_tells_which_accuracy_it_has(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from torchfedrpc.experiments.learners.ditto import DittoLearner
    from torchfedrpc.federation.algorithms.ditto import DittoTrainer

    settings = {"trainer": recipe(DittoTrainer, num_rounds=1), "learner": recipe(DittoLearner)}
    for evaluate_every, is_told in ((None, True), (1, False)):
        await run_experiment(config(**settings, evaluate_every=evaluate_every), tmp_path / str(is_told))
        assert ("test accuracies are of the global model" in capsys.readouterr().out) == is_told


def test_samples_of_several_clients_are_told() -> None:
    assert shared_samples([np.array([0, 1]), np.array([2])]) is None
    found = shared_samples([np.arange(3), np.arange(2)])
    assert found == "3 samples are given to clients 5 times: some are of several clients"
