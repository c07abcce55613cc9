"""Robust aggregators: their definitions, and what survives wrong models."""

from __future__ import annotations

import math

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
