"""Checkpoints have the state of a trainer's aggregator, cohort and simulation, and refuse others than before."""

from __future__ import annotations

import functools
import itertools
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import torchfedrpc as tfr
from torchfedrpc.errors import ConfigError
from torchfedrpc.federation.aggregation import Mean, StateDict

CLIENTS = ["a", "b", "c"]


class Learner:
    """Adds noise to the weights."""

    def __init__(self, client_id: str) -> None:
        self.client_id = client_id

    def train_epoch(self, model_weights: Any, round_num: int = 0, local_epochs: int = 1) -> dict[str, Any]:
        """Train."""
        weights = {name: value + torch.randn(value.shape) for name, value in model_weights.items()}
        return {"model_weights": weights, "num_samples": 1 + ord(self.client_id) % 3, "train_loss": 0.5**round_num}


class Momentum:
    """Mean with momentum, which is its state; ``rate`` is a setting."""

    def __init__(self, rate: float = 0.5) -> None:
        self.rate = rate
        self.last: dict[str, Any] = {}

    def __call__(self, models: Sequence[StateDict], num_samples: Sequence[float], /) -> StateDict:
        mean = Mean()(models, num_samples)
        self.last = {name: value + self.rate * self.last.get(name, 0) for name, value in mean.items()}
        return self.last


class MomentumOfMean(Mean):
    """The same, derived from the bundled mean, whose reducer would leave it out."""

    def __init__(self) -> None:
        self.of_mean = Momentum()

    def __call__(self, models: Sequence[StateDict], num_samples: Sequence[float], /) -> dict[str, Any]:
        return dict(self.of_mean(models, num_samples))


class Turns:
    """A cohort that counts."""

    def __init__(self) -> None:
        self.count = 0

    async def __call__(self, trainer: Any, round_num: int, clients: Sequence[str], size: int, /) -> Sequence[str]:
        self.count += 1
        return [clients[self.count % 3], clients[(self.count + 1) % 3]]


class Adaptive(tfr.FedAvgTrainer):
    """Chooses by what the last round has left."""

    def select_clients(self, round_num: int) -> list[str]:
        number = 1 + round(4 * self.averages.get("train_loss", 0)) + self.num_results
        return CLIENTS[: 1 + number % 3]


async def train(folder: Path | None, num_rounds: int, kind: Any = tfr.FedAvgTrainer, **given: Any) -> Any:
    """Returns the weights and the trainer."""
    config = given.pop("config", {})
    async with tfr.LearnerProxy(Learner, CLIENTS, runtime="local") as proxy:
        weights = {"w": torch.zeros(3)}
        trainer = kind({"num_rounds": num_rounds, **config}, proxy, initial_weights=weights, **given)
        trainer.checkpoints = None if folder is None else tfr.Checkpoints(folder, resume="auto")
        final = await trainer.train()
        return final["w"].tolist(), trainer


@pytest.mark.parametrize("weighting", ["samples", "uniform"])
@pytest.mark.parametrize(
    ("kind", "make"),
    [
        (tfr.FedAvgTrainer, lambda: {"aggregator": Momentum()}),
        (tfr.FedAvgTrainer, lambda: {"aggregator": MomentumOfMean()}),
        (tfr.FedAvgTrainer, lambda: {"aggregator": tfr.GaussianMean(1.0, 0.5, seed=3, delta=None)}),
        (tfr.FedAvgTrainer, lambda: {"cohort": Turns()}),
        (Adaptive, dict),
    ],
)
async def test_a_run_that_resumes_has_the_bits_of_one_that_does_not(
    weighting: str, kind: Any, make: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = {"weighting": weighting}
    expected, _ = await train(None, 6, kind, config=config, **make())
    await train(tmp_path, 2, kind, config=config, **make())
    given = make()
    found, trainer = await train(tmp_path, 6, kind, config=config, **given)
    assert found == expected
    for name, part in given.items():
        assert getattr(trainer, name) is part
    assert "no part of checkpoints" not in caplog.text


async def test_a_subclass_of_the_mean_is_called_whatever_the_weighting() -> None:
    weights = [
        (await train(None, 3, config={"weighting": "samples"}, **given))[0]
        for given in ({"aggregator": Momentum()}, {"aggregator": MomentumOfMean()}, {})
    ]
    assert weights[0] == weights[1] != weights[2]


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        ({"aggregator": Momentum(0.5)}, {"aggregator": Momentum(0.1)}, r"aggregator has rate=0\.1, and had 0\.5"),
        ({"aggregator": Momentum()}, {}, "aggregator is Mean, and was Momentum"),
        (
            {"aggregator": tfr.TrimmedMean(0.1)},
            {"aggregator": tfr.TrimmedMean(0.2)},
            r"aggregator has fraction=0\.2, and had 0\.1",
        ),
        ({}, {"cohort": tfr.RoundRobinCohort()}, "cohort is RoundRobinCohort, and was NoneType"),
        (
            {"simulation": tfr.SimulatedClients(dropout=0.1)},
            {"simulation": tfr.SimulatedClients(dropout=0.2)},
            r"simulation has dropout=0\.2, and had 0\.1",
        ),
        ({"kind": tfr.FedAdamTrainer}, {"kind": tfr.FedYogiTrainer}, "trainer was 'FedAdamTrainer'"),
    ],
)
async def test_a_resume_with_another_part_is_refused(
    first: Mapping[str, Any], second: Mapping[str, Any], message: str, tmp_path: Path
) -> None:
    await train(tmp_path, 2, **first)
    with pytest.raises(ConfigError, match=message):
        await train(tmp_path, 4, **second)


class SlotsOfPlainState:
    """A mean with momentum, whose state is in a slot."""

    __slots__ = ("last",)

    def __init__(self) -> None:
        self.last: dict[str, Any] = {}

    def __call__(self, models: Sequence[StateDict], num_samples: Sequence[float], /) -> StateDict:
        mean = Mean()(models, num_samples)
        self.last = {name: value + 0.5 * self.last.get(name, 0) for name, value in mean.items()}
        return self.last


class Draws(Momentum):
    """Its constructor draws, and it has a function."""

    def __init__(self) -> None:
        super().__init__()
        self.rng = np.random.default_rng()
        self.begun = time.time()
        self.key = lambda value: value
        self.trainer: Any = None

    def begin_run(self, trainer: Any) -> None:
        self.trainer = trainer

    def combine(self, models: Sequence[StateDict], num_samples: Sequence[float], /) -> StateDict:
        return self(models, num_samples)


class Wraps:
    """An aggregator in which others are."""

    def __init__(self) -> None:
        self.inner = tfr.CoordinateMedian()
        self.of_mean = Momentum()

    def __call__(self, models: Sequence[StateDict], num_samples: Sequence[float], /) -> StateDict:
        median = self.inner(models, num_samples)
        return self.of_mean([median], [1.0])


class OwnRound(tfr.FedAvgTrainer):
    """Has a round of its own, and sets its aggregator up in `train`."""

    async def train(self) -> Any:
        self.aggregator.set_up = True  # type: ignore[attr-defined]
        return await super().train()

    async def train_round(self, round_num: int) -> dict[str, float]:
        results = await self.learner_proxy.clients().train_epoch(model_weights=self.weights, round_num=round_num)
        models = [result["model_weights"] for result in results.values()]
        self.weights = await self.aggregate_weights(models)
        return {}


@pytest.mark.parametrize(
    ("kind", "make"),
    [
        (tfr.FedAvgTrainer, lambda: {"aggregator": SlotsOfPlainState()}),
        (tfr.FedAvgTrainer, lambda: {"aggregator": Draws()}),
        (tfr.FedAvgTrainer, lambda: {"aggregator": Draws().combine}),
        (tfr.FedAvgTrainer, lambda: {"aggregator": Wraps()}),
        (OwnRound, lambda: {"aggregator": Momentum()}),
    ],
)
async def test_aggregators_of_many_kinds_go_on(
    kind: Any, make: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    expected, _ = await train(None, 5, kind, **make())
    await train(tmp_path, 2, kind, **make())
    found, _ = await train(tmp_path, 5, kind, **make())
    assert found == expected
    assert "inner of the trainer's aggregator" not in caplog.text


async def test_a_partial_with_other_arguments_is_refused(tmp_path: Path) -> None:
    def trimmed(fraction: float) -> Any:
        return {"aggregator": functools.partial(_trimmed, fraction=fraction)}

    await train(tmp_path, 2, **trimmed(0.1))
    with pytest.raises(ConfigError, match=r"aggregator has fraction=0\.2, and had 0\.1 in the checkpoint"):
        await train(tmp_path, 4, **trimmed(0.2))


def _trimmed(models: Any, num_samples: Any, fraction: float) -> Any:
    return tfr.TrimmedMean(fraction)(models, num_samples)


class OwnClients(tfr.SimulatedClients):
    """A simulation with a constructor of its own."""

    def __init__(self, trace: str) -> None:
        super().__init__(slow_fraction=0.5, seed=1)
        object.__setattr__(self, "trace", trace)


async def test_a_simulation_of_ones_own_is_the_one_that_is_used() -> None:
    given = OwnClients("a trace")
    _, trainer = await train(None, 2, simulation=given)
    assert trainer.simulation is given
    assert sum(given.seconds(client, 0) > 1 for client in CLIENTS) == 2  # half of three, rounded


async def test_a_history_that_was_given_is_filled(tmp_path: Path) -> None:
    await train(tmp_path, 2)
    history: list[Any] = []
    await train(tmp_path, 4, history=history)
    assert [ended.round_num for ended in history] == [0, 1, 2, 3]


async def test_an_aggregator_that_cannot_be_saved_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    aggregator: Any = Momentum()
    aggregator.numbers = itertools.count()
    await train(tmp_path, 3, aggregator=aggregator)
    assert caplog.text.count("numbers of the trainer's aggregator is no part of checkpoints") == 1
    assert "define state_dict() and load_state_dict() of the aggregator" in caplog.text


async def test_a_trainer_does_not_share_the_weights_that_it_was_given() -> None:
    weights = {"w": torch.zeros(3)}
    async with tfr.LearnerProxy(Learner, CLIENTS, runtime="local") as proxy:
        trainer = tfr.FedAvgTrainer({"num_rounds": 1}, proxy, initial_weights=weights)
        weights["w"].fill_(9)
        assert trainer.weights is not None
        assert trainer.weights["w"].tolist() == [0, 0, 0]


async def test_an_object_as_config_has_the_same_defaults_as_a_mapping() -> None:
    async def run(config: Any) -> Any:
        async with tfr.LearnerProxy(Learner, CLIENTS, runtime="local") as proxy:
            simulation = tfr.SimulatedClients(spread=0.3)
            weights = {"w": torch.zeros(3)}
            trainer = tfr.FedBuffTrainer(config, proxy, initial_weights=weights, simulation=simulation)
            final = await trainer.train()
            assert final is not None
            return final["w"].tolist()

    settings = {"num_rounds": 3, "buffer_size": 2}
    assert await run(settings) == await run(SimpleNamespace(**settings))
