"""Differential privacy of clients: clipping, noise, epsilon against published values, and what is refused."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from conftest import needs
from torch import Tensor

import torchfedrpc as tfr
from torchfedrpc.errors import ConfigError
from torchfedrpc.experiments.training import build_model, copy_weights
from torchfedrpc.federation.aggregation import Mean
from torchfedrpc.federation.privacy import epsilon

DATASET = {"_target_": "torchfedrpc.experiments.data.synthetic.synthetic", "num_samples": 120}
LOGISTIC = {"_target_": "torchfedrpc.experiments.models.LogisticRegression"}
CONVNET = {"_target_": "torchfedrpc.experiments.models.ConvNet", "channels": [2, 3], "batch_norm": True}
DELTA = 1e-5


def gaussian(noise_multiplier: float = 0.0, seed: int | None = 3, **settings: Any) -> tfr.GaussianMean:
    return tfr.GaussianMean(
        **{"clip_norm": 0.5, "delta": None, **settings}, noise_multiplier=noise_multiplier, seed=seed
    )


async def train(
    kind: type[tfr.FedAvgTrainer] = tfr.FedAvgTrainer,
    *,
    learner: str = "classification",
    model: Any = LOGISTIC,
    aggregator: Any = None,
    cohort: Any = None,
    simulation: Any = None,
    set_up: Callable[[tfr.FedAvgTrainer], None] = lambda trainer: None,
    **config: Any,
) -> tfr.FedAvgTrainer:
    """A trainer after its run with three clients."""
    shares = np.split(np.arange(96), 3)
    common = {"dataset": DATASET, "model": model, "momentum": 0.0, "learning_rate": 0.05}
    clients = {client: {**common, "indices": share} for client, share in zip("abc", shares, strict=True)}
    made = build_model(model, 0)
    async with tfr.LearnerProxy(learner, clients, runtime="local") as proxy:
        trainer = kind(
            {"num_rounds": 2, **config},
            proxy,
            initial_weights=copy_weights(made),
            buffers=[name for name, _ in made.named_buffers()],
            aggregator=aggregator or gaussian(),
            cohort=cohort,
            simulation=simulation,
        )
        set_up(trainer)
        await trainer.train()
        return trainer


class Zeros:
    """What an aggregator needs of a trainer, with two parameters."""

    config: Any = None
    learner_proxy: Any = type("Proxy", (), {"client_ids": ["a", "b", "c"]})
    weights = {"w": torch.zeros(2), "v": torch.zeros(1)}

    def parameter_names(self) -> list[str]:
        return ["w", "v"]

    def personal_names(self) -> frozenset[str]:
        return frozenset()


def mean(aggregator: tfr.GaussianMean, changes: list[list[float]], round_num: int = 0) -> Tensor:
    """The aggregate of changes from zeros, flat."""
    aggregator.begin_run(Zeros())  # type: ignore[arg-type]
    aggregator.begin_round(Zeros.weights, round_num)
    models = [{"w": torch.tensor(change[:2]), "v": torch.tensor(change[2:])} for change in changes]
    return torch.cat([*aggregator(models, [1.0, 1e9, 1.0][: len(models)]).values()])


def test_changes_are_clipped_over_all_parameters_and_count_alike() -> None:
    found = mean(gaussian(), [[0.3, 0.0, 0.4], [3.0, 0.0, 4.0], [0.0, 0.1, 0.0]])  # norms 0.5, 5 and 0.1
    assert found.tolist() == pytest.approx([0.2, 0.1 / 3, 0.8 / 3])


@pytest.mark.parametrize("wrong", [math.nan, math.inf, 3e38])
def test_a_wrong_model_moves_the_mean_by_the_clip_norm_at_most(wrong: float) -> None:
    right = [[0.1, 0.0, 0.0], [0.1, 0.0, 0.0]]
    moved = mean(gaussian(), [*right, [wrong, wrong, wrong]]) - mean(gaussian(), [*right, [0.0] * 3])
    assert moved.norm() <= 0.5 / 3 + 1e-6


def test_noise_in_the_sum_has_its_standard_deviation() -> None:
    aggregator = gaussian(2.0)
    draws = torch.stack([mean(aggregator, [[0.0] * 3, [0.0] * 3], number) for number in range(2000)])
    assert draws.std().item() == pytest.approx(2.0 * 0.5 / 2, rel=0.03)  # noise_multiplier * clip_norm / models
    assert abs(draws.mean().item()) < 0.03


def test_seeded_noise_depends_on_seed_and_round_alone_and_unseeded_noise_differs() -> None:
    still = [[0.0] * 3]
    first = mean(gaussian(1.0), still)
    assert torch.equal(mean(gaussian(1.0), still), first)
    assert not torch.equal(mean(gaussian(1.0), still, 1), first)
    assert not torch.equal(mean(gaussian(1.0, seed=4), still), first)
    assert not torch.equal(mean(gaussian(1.0, seed=None), still), mean(gaussian(1.0, seed=None), still))


class FailsAtTheEnd(tfr.Callback):
    """Notes the weights of each round, and fails in the last one."""

    def __init__(self, seen: list[Any]) -> None:
        self.seen = seen

    def on_round_end(self, run: tfr.Run, ended: tfr.RoundEnded) -> None:
        trainer: Any = run.trainer
        self.seen.append((ended.round_num, trainer.weights["linear.bias"].tolist()))
        if ended.round_num == 2 and len(self.seen) == 3:
            raise LookupError("lost")


async def test_a_round_that_runs_again_after_a_crash_has_the_same_secret_noise(tmp_path: Any) -> None:
    seen: list[Any] = []

    def set_up(trainer: tfr.FedAvgTrainer) -> None:
        trainer.checkpoints = tfr.Checkpoints(tmp_path, every=2, resume="auto")
        trainer.callbacks = [FailsAtTheEnd(seen)]

    with pytest.raises(LookupError):
        await train(aggregator=gaussian(1.0, seed=None), num_rounds=4, set_up=set_up)
    await train(aggregator=gaussian(1.0, seed=None), num_rounds=4, set_up=set_up)
    assert [round_num for round_num, _ in seen] == [0, 1, 2, 2, 3]
    assert seen[2] == seen[3]


def test_epsilon_with_sampling_is_not_above_that_of_all_clients() -> None:
    needs("dp_accounting")
    base: Any = {"num_clients": 4, "num_rounds": 3, "delta": DELTA}
    assert epsilon(1.0, cohort_size=3, **base) <= epsilon(1.0, cohort_size=4, **base)


def moments(noise: float, rate: float, order: int) -> float:
    """Renyi divergence of the Gaussian mechanism with Poisson sampling (Mironov et al. 2019, section 3.3)."""
    terms = [
        math.lgamma(order + 1) - math.lgamma(k + 1) - math.lgamma(order - k + 1)
        + k * math.log(rate) + (order - k) * math.log1p(-rate) + (k * k - k) / (2 * noise**2)
        for k in range(order + 1)
    ]  # fmt: skip
    return float(np.logaddexp.reduce(terms)) / (order - 1)


def test_epsilon_of_sampling_by_poisson_is_the_published_one() -> None:
    needs("dp_accounting")
    orders = range(2, 64)
    divergences = {order: 10_000 * moments(4.0, 0.01, order) for order in orders}
    # Abadi et al. 2016, section 5.1: 1.26 for q = 0.01, noise 4, delta 1e-5, 100 epochs; with Mironov's conversion.
    assert min(value + math.log(1 / DELTA) / (order - 1) for order, value in divergences.items()) == pytest.approx(
        1.26, abs=0.005
    )
    # The accountant converts more tightly (Canonne et al. 2020, proposition 12).
    tight = min(
        value + math.log1p(-1 / order) - math.log(DELTA * order) / (order - 1) for order, value in divergences.items()
    )
    found = epsilon(4.0, cohort_size=10, num_clients=1000, num_rounds=10_000, delta=DELTA, sampling="poisson")
    assert found == pytest.approx(tight, rel=1e-3)
    assert found < 1.26


def test_epsilon_of_all_clients_is_that_of_the_gaussian_mechanism() -> None:
    needs("dp_accounting")
    found = epsilon(20.0, cohort_size=10, num_clients=10, num_rounds=50, delta=DELTA)
    # Mironov 2017, corollary 3: the divergence is order * sensitivity^2 / (2 * noise^2); a replaced client changes
    # the sum by up to twice the clip norm.
    slope = 50 * 2**2 / (2 * 20.0**2)
    orders = np.arange(2, 200)
    tight = orders * slope + np.log1p(-1 / orders) - np.log(DELTA * orders) / (orders - 1)
    assert found == pytest.approx(tight.min(), rel=1e-3)


def test_epsilon_of_a_fixed_cohort_grows_with_rounds_and_clients_and_is_above_that_of_poisson() -> None:
    needs("dp_accounting")
    base = {"cohort_size": 10, "num_clients": 1000, "num_rounds": 100, "delta": DELTA}
    found = epsilon(4.0, **base)
    assert found > epsilon(4.0, **base, sampling="poisson")
    for change in ({"num_rounds": 200}, {"cohort_size": 20}, {"num_clients": 500}, {"delta": 1e-6}):
        assert epsilon(4.0, **base | change) > found
    with pytest.raises(ConfigError, match="sampling is fixed or poisson, not 'uniform'"):
        epsilon(4.0, **base, sampling="uniform")


async def test_the_history_has_epsilon_of_each_round() -> None:
    needs("dp_accounting")
    aggregator = gaussian(8.0, delta=DELTA)
    trainer: Any = await train(aggregator=aggregator, clients_per_round=2, cohort=tfr.UniformCohort())
    assert [ended.metrics["epsilon"] for ended in trainer.history] == [
        epsilon(8.0, cohort_size=2, num_clients=3, num_rounds=number, delta=DELTA) for number in (1, 2)
    ]


async def test_without_noise_and_clipping_the_mean_is_that_of_uniform_weighting() -> None:
    plain = await train(aggregator=Mean(), weighting="uniform")
    clipped: Any = await train(aggregator=gaussian(clip_norm=1e6))
    assert "epsilon" not in clipped.history[-1].metrics
    assert plain.weights is not None
    for name, value in plain.weights.items():
        torch.testing.assert_close(clipped.weights[name], value)


async def test_entries_that_stay_with_the_clients_of_fedbn_have_no_noise() -> None:
    before = copy_weights(build_model(CONVNET, 0))
    trainer = await train(tfr.FedBNTrainer, learner="fedbn", model=CONVNET, aggregator=gaussian(1.0))
    assert trainer.weights is not None
    same = {name for name, value in trainer.weights.items() if torch.equal(value, before[name])}
    assert same == trainer.personal_names()
    assert {name.split(".")[1] for name in same} == {"1", "5"}
    assert {"running_mean", "num_batches_tracked", "weight"} < {name.rpartition(".")[2] for name in same}


async def test_fedbuff_gives_its_present_weights() -> None:
    trainer: Any = await train(
        tfr.FedBuffTrainer,
        aggregator=gaussian(clip_norm=1e-3),
        simulation=tfr.SimulatedClients(spread=0.3),
        buffer_size=2,
        num_in_flight=2,
    )
    before = copy_weights(build_model(LOGISTIC, 0))
    moved = math.sqrt(sum(float((trainer.weights[name] - value).square().sum()) for name, value in before.items()))
    assert 0 < moved <= 2 * 1e-3 * 1.001


async def test_buffers_that_would_be_averaged_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"a mean of .*running_mean would leak.*batch_norm=false.*trainer=fedbn"):
        await train(model=CONVNET)
    with pytest.raises(ConfigError, match="running_mean would leak"):
        await train(tfr.FedBNTrainer, learner="fedbn", model=CONVNET, personal=["head.*"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kind": tfr.FedBuffTrainer, "buffer_size": 2, "num_in_flight": 2}, "the rounds of FedBuffTrainer"),
        ({"kind": tfr.ScaffoldTrainer, "learner": "scaffold"}, "ScaffoldTrainer, since control_change"),
        ({"kind": tfr.FedNovaTrainer}, "FedNovaTrainer, since gradient_weight"),
        ({"cohort": tfr.RoundRobinCohort()}, "the cohorts of .*RoundRobinCohort"),
        ({"on_failure": "drop"}, "clients that failed"),
        ({"min_results": 2}, "the trainer's min_results"),
        ({"deadline_s": 60.0}, "the trainer's deadline_s"),
        ({"simulation": tfr.SimulatedClients(dropout=0.2)}, "clients drop out"),
        ({"simulation": tfr.SimulatedClients(deadline_s=2.0)}, "clients drop out"),
    ],
)
async def test_what_no_accountant_covers_is_refused_and_trains_without_epsilon(
    arguments: dict[str, Any], message: str
) -> None:
    needs("dp_accounting")
    with pytest.raises(ConfigError, match=f"no accountant covers .*{message}.*set aggregator.delta to null"):
        await train(**arguments, aggregator=gaussian(1.0, delta=DELTA))
    await train(**arguments, aggregator=gaussian(1e-3), num_rounds=1)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"clip_norm": 0}, r"aggregator\.clip_norm is a number above 0, not 0"),
        ({"clip_norm": math.inf}, r"aggregator\.clip_norm is a number above 0, not inf"),
        ({"clip_norm": math.nan}, r"aggregator\.clip_norm is a number above 0, not nan"),
        ({"clip_norm": "1"}, r"aggregator\.clip_norm is a number above 0, not '1'"),
        ({"noise_multiplier": -1}, r"aggregator\.noise_multiplier is a number of at least 0, not -1"),
        ({"delta": 0}, r"aggregator\.delta is above 0 and below 1, or null, not 0"),
        ({"delta": 1}, r"aggregator\.delta is above 0 and below 1, or null, not 1"),
        ({"seed": -1}, r"aggregator\.seed is 0, 1, 2, \.\.\., or null, not -1"),
        ({"seed": 0.5}, r"aggregator\.seed is 0, 1, 2, \.\.\., or null, not 0\.5"),
        ({"delta": 1e-5}, "without noise epsilon is infinite"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        gaussian(**settings)


def test_a_missing_accountant_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "dp_accounting", None)
    with pytest.raises(ConfigError, match=r"epsilon needs dp_accounting.*pip install 'torchfedrpc\[privacy\]'"):
        gaussian(1.0, delta=DELTA)
    gaussian(1.0)


def test_the_global_weights_are_needed() -> None:
    with pytest.raises(ConfigError, match=r"begin_round\(weights, round_num\) before each round"):
        gaussian()([{"w": torch.zeros(1)}], [1.0])
    aggregator = gaussian()
    aggregator.begin_run(Zeros())  # type: ignore[arg-type]
    aggregator.begin_round(Zeros.weights, 0)
    with pytest.raises(ValueError, match="nothing to aggregate"):
        aggregator([], [])
    aggregator.begin_round(Zeros.weights, 0)
    with pytest.raises(ValueError, match=r"'w' has shape \[3\]"):
        aggregator([{"w": torch.zeros(3), "v": torch.zeros(1)}], [1.0])
