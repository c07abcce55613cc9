"""Robust aggregators: their definitions, and what survives wrong models."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import torchfedrpc as tfr
from torchfedrpc.errors import ConfigError


def models(*values: float, count: int = 1) -> list[dict[str, Tensor]]:
    return [
        {"weight": torch.tensor([[float(value), -float(value)]]), "count": torch.tensor(count)} for value in values
    ]


def ones(states: list[dict[str, Tensor]]) -> list[float]:
    return [1.0] * len(states)


@pytest.mark.parametrize(("values", "median"), [((3, 1, 100), 3), ((3, 1, 100, 2), 2.5), ((7,), 7)])
def test_the_median_is_that_of_each_coordinate(values: tuple[float, ...], median: float) -> None:
    states = models(*values)
    result = tfr.CoordinateMedian()(states, ones(states))
    assert result["weight"].tolist() == [[median, -median]]
    assert result["count"].item() == 1
    assert result["count"].dtype == torch.int64


def test_a_trimmed_mean_leaves_out_both_ends_of_each_coordinate() -> None:
    generator = np.random.default_rng(0)
    values = generator.normal(size=(11, 4)).astype(np.float32)
    states = [{"w": torch.from_numpy(row)} for row in values]
    found = tfr.TrimmedMean(0.2)(states, ones(states))["w"].numpy()
    assert found == pytest.approx(np.sort(values, axis=0)[3:-3].mean(axis=0), abs=1e-6)
    assert tfr.TrimmedMean(0)(states, ones(states))["w"].numpy() == pytest.approx(values.mean(axis=0), abs=1e-6)


def test_krum_is_the_model_with_the_nearest_neighbours() -> None:
    states = models(0.0, 0.1, 0.3, 0.2, 50.0)
    # With f = 1 each model has 5 - 1 - 2 = 2 neighbours: 0.1 and 0.2 have them at 0.1 and 0.1.
    assert tfr.MultiKrum(1, num_selected=1)(states, ones(states))["weight"][0, 0] == pytest.approx(0.1)
    assert tfr.MultiKrum(1)(states, ones(states))["weight"][0, 0] == pytest.approx(0.15)


@pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf, 1e30])
@pytest.mark.parametrize(
    "aggregator", [tfr.CoordinateMedian(), tfr.TrimmedMean(0.3), tfr.MultiKrum(2)], ids=lambda one: type(one).__name__
)
def test_two_wrong_models_of_seven_change_little(aggregator: tfr.MultiKrum, wrong: float) -> None:
    states = models(1.0, wrong, 1.1, 0.9, wrong, 1.05, 0.95)
    result = aggregator(states, ones(states))["weight"]
    assert result[0].tolist() == pytest.approx([1, -1], abs=0.11)


def test_settings_and_cohorts_that_do_not_fit_are_refused() -> None:
    for fraction in (-0.1, 0.5, math.nan):
        with pytest.raises(ConfigError, match=r"aggregator\.fraction is at least 0 and below 0\.5"):
            tfr.TrimmedMean(fraction)
    with pytest.raises(ConfigError, match="num_attackers is at least 0"):
        tfr.MultiKrum(-1)
    with pytest.raises(ConfigError, match="num_selected is at least 1"):
        tfr.MultiKrum(1, 0)
    states = models(1.0, 2.0, 3.0, 4.0)
    with pytest.raises(ValueError, match="has none left"):
        tfr.TrimmedMean(0.4)(states, ones(states))
    with pytest.raises(ValueError, match="needs more than 4 models, and has 4"):
        tfr.MultiKrum(1)(states, ones(states))
    with pytest.raises(ValueError, match="nothing to aggregate"):
        tfr.CoordinateMedian()([], [])
    odd = [*models(1.0), {"weight": torch.zeros(3), "count": torch.tensor(1)}]
    with pytest.raises(ValueError, match=r"'weight' has shape \[3\] in the state dict at 1"):
        tfr.CoordinateMedian()(odd, ones(odd))


class Liar:
    """Adds one to the weights; client c lies about what the algorithm averages beside the models."""

    def __init__(self, client_id: str, lie: Any) -> None:
        self.lie = lie if client_id == "c" else None

    def train_epoch(self, model_weights: Any, **settings: Any) -> dict[str, Any]:
        weights = {"w": model_weights["w"] + 1}
        result = {"model_weights": weights, "num_samples": 1, "train_loss": 0.0}
        if "normalise" in settings:
            return {**result, "gradient_weight": 2.0 if self.lie is None else self.lie}
        return {**result, "control_change": {"w": torch.full((2,), 3.0 if self.lie is None else self.lie)}}


@pytest.mark.parametrize("lie", [1e6, math.nan])
@pytest.mark.parametrize("aggregator", [tfr.CoordinateMedian(), tfr.TrimmedMean(0.25), tfr.MultiKrum(0, 3)])
@pytest.mark.parametrize("kind", [tfr.FedNovaTrainer, tfr.ScaffoldTrainer])
async def test_what_an_algorithm_averages_beside_the_models_is_robust_as_well(
    kind: Any, aggregator: Any, lie: float
) -> None:
    clients: Any = {client: {"lie": lie} for client in "abcd"}
    async with tfr.LearnerProxy(Liar, clients, runtime="local") as proxy:
        trainer = kind({"num_rounds": 1}, proxy, initial_weights={"w": torch.zeros(2)}, aggregator=aggregator)
        weights = await trainer.train()
    assert weights["w"].tolist() == ([2, 2] if kind is tfr.FedNovaTrainer else [1, 1])
    if kind is tfr.ScaffoldTrainer:
        assert trainer.control["w"].tolist() == [3, 3]


def test_multi_krum_leaves_out_what_the_clients_that_it_leaves_out_say() -> None:
    states = models(1.0, 1.1, 0.9, 50.0, 1.0)
    others = [{"weight": torch.tensor(float(number == 3) * 1e6)} for number in range(5)]
    model, other = tfr.MultiKrum(1).aggregate(states, others)
    assert model["weight"].abs().max() < 2
    assert other["weight"] == 0


class Clipped(tfr.CoordinateMedian):
    """A median of models that are clipped."""

    def __call__(self, models: Any, num_samples: Any, /) -> dict[str, Tensor]:
        return super().__call__([{"w": model["w"].clamp(max=0.5)} for model in models], num_samples)


async def test_a_call_of_a_subclass_is_made() -> None:
    async with tfr.LearnerProxy(Liar, {client: {"lie": 0.0} for client in "ab"}, runtime="local") as proxy:
        trainer = tfr.FedAvgTrainer(
            {"num_rounds": 1}, proxy, initial_weights={"w": torch.zeros(2)}, aggregator=Clipped()
        )
        weights = await trainer.train()
    assert weights is not None
    assert weights["w"].tolist() == [0.5, 0.5]


class Counts(tfr.FedAvgTrainer):
    """Averages entries of several kinds."""

    averaged = ("train_loss", "counts", "nested", "listed")


class Counter(Liar):
    """Returns them."""

    def train_epoch(self, model_weights: Any, **settings: Any) -> dict[str, Any]:
        result = super().train_epoch(model_weights, **settings)
        return {**result, "counts": torch.arange(3.0), "nested": {"a": {"b": torch.ones(2)}}, "listed": [1.0, 2.0]}


async def test_entries_of_any_kind_are_averaged_with_a_robust_aggregator() -> None:
    async with tfr.LearnerProxy(Counter, {client: {"lie": 0.0} for client in "ab"}, runtime="local") as proxy:
        given: Any = {"initial_weights": {"w": torch.zeros(2)}, "aggregator": tfr.CoordinateMedian()}
        trainer = Counts({"num_rounds": 1}, proxy, **given)
        await trainer.train()
    assert trainer.averages["counts"].tolist() == [0, 1, 2]
    assert trainer.averages["nested"]["a"]["b"].tolist() == [1, 1]
    assert list(trainer.averages["listed"]) == [1, 2]


def test_a_fraction_of_the_models_is_rounded_up_but_for_the_errors_of_floats() -> None:
    states = models(*range(100))
    assert tfr.TrimmedMean(0.07)(states, ones(states))["weight"][0, 0] == np.mean(range(7, 93))
    states = models(0, 0, 0, 0, 0, 0, 0, 0, 0, 9, 9)
    assert tfr.TrimmedMean(0.1)(states, ones(states))["weight"][0, 0] == 0


def test_complex_entries_count_in_distances() -> None:
    states = [{"w": torch.tensor([complex(1, value)])} for value in (0.0, 0.1, 0.2, 90.0, 0.1)]
    assert tfr.MultiKrum(1)(states, ones(states))["w"].imag.item() == pytest.approx(0.1)
