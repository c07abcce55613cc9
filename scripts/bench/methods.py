"""Compare algorithms where their papers say that they differ: five seeds each, with learning rates tuned alike.

A learning rate is chosen for each algorithm from the same ones by a run with a seed of its own. Data are the digits
of scikit-learn and synthetic images; everything runs in local mode.
"""

from __future__ import annotations

import argparse
import asyncio
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch

import torchfedrpc as tfr
from torchfedrpc.experiments.data.digits import digits
from torchfedrpc.experiments.data.partition import dirichlet, iid, shards
from torchfedrpc.experiments.data.synthetic import synthetic
from torchfedrpc.experiments.training import build_model, copy_weights, score

ROOT = Path(__file__).resolve().parent.parent.parent
NUM_CLIENTS = 10
RATES = (0.01, 0.03, 0.1, 0.3)
TUNING_SEED = 100
ATTACKERS = ("client_0", "client_5")
MLP: dict[str, Any] = {"_target_": "torchfedrpc.experiments.models.MLP"}
CNN: dict[str, Any] = {"_target_": "torchfedrpc.experiments.models.ConvNet", "channels": [4, 8], "batch_norm": True}

Metrics = list[dict[str, float]]


@dataclass(frozen=True)
class Method:
    """An algorithm as it takes part in a comparison.

    Attributes:
        name: Its name in the table.
        trainer: Class of the trainer.
        learner: Registered name, or class, of the learner.
        config: Settings of the trainer.
        given: Keyword arguments of the trainer, made for each run.
    """

    name: str
    trainer: type[tfr.FedAvgTrainer]
    learner: Any = "classification"
    config: Mapping[str, Any] = field(default_factory=dict)
    given: Callable[[int], dict[str, Any]] = lambda seed: {}


@dataclass(frozen=True)
class Comparison:
    """Algorithms on one task.

    Attributes:
        title: What is compared.
        measure: What a run is measured by: rounds or virtual seconds to a target, or an accuracy at the end.
        dataset: Recipe of the data.
        model: Recipe of the model.
        parts: Returns each client's indices, from the data and a seed.
        methods: The algorithms; the first one is the baseline.
        result: Returns the measure of a run, from its rounds and the clients' accuracies.
        is_better: Whether more of the measure is better.
        settings: Settings of all trainers.
    """

    title: str
    measure: str
    dataset: Mapping[str, Any]
    model: Mapping[str, Any]
    parts: Callable[[tfr.TrainTest, int], Sequence[Any]]
    methods: Sequence[Method]
    result: Callable[[Metrics, Sequence[float]], float]
    more_is_better: bool
    settings: Mapping[str, Any]


class Attacked(tfr.ClassificationLearner):
    """Two of ten clients return a step in the opposite direction, ten times as long."""

    def train_epoch(self, model_weights: Any = None, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Train, or attack."""
        result = super().train_epoch(model_weights, *args, **kwargs)
        if self.client_id in ATTACKERS:
            trained = result["model_weights"]
            result["model_weights"] = {name: old - 10 * (trained[name] - old) for name, old in model_weights.items()}
        return result


def skewed() -> tfr.TrainTest:
    """Synthetic images whose contrast and brightness depend on the client."""
    data = synthetic(num_samples=2000)
    inputs = data.train.inputs.clone()
    for client, share in enumerate(iid(data.train.labels.numpy(), NUM_CLIENTS)):
        inputs[share] = inputs[share] * 1.3 ** (client - 4) + 0.4 * (client - 4)
    return tfr.TrainTest(tfr.Samples(inputs, data.train.labels), data.test)


@cache
def data_of(target: str) -> tfr.TrainTest:
    """Load a data set once."""
    made: tfr.TrainTest = skewed() if target == SKEWED else digits()
    return made


def rounds_to(target: float) -> Callable[[Metrics, Sequence[float]], float]:
    """Return the number of rounds until a test accuracy, or one more than there are."""

    def count(rounds: Metrics, accuracies: Sequence[float]) -> float:
        reached = [number for number, one in enumerate(rounds, 1) if one["accuracy"] >= target]
        return float(reached[0] if reached else len(rounds) + 1)

    return count


def seconds_to(target: float) -> Callable[[Metrics, Sequence[float]], float]:
    """Return the virtual seconds until a test accuracy; those of the whole run if it is not reached."""

    def seconds(rounds: Metrics, accuracies: Sequence[float]) -> float:
        return next(
            (one["simulated_seconds"] for one in rounds if one["accuracy"] >= target), rounds[-1]["simulated_seconds"]
        )

    return seconds


def final(rounds: Metrics, accuracies: Sequence[float]) -> float:
    """Return the mean test accuracy of the last five rounds."""
    return statistics.fmean(one["accuracy"] for one in rounds[-5:])


def worst(rounds: Metrics, accuracies: Sequence[float]) -> float:
    """Return the lowest accuracy of a client on samples of its own, which is the worst decile of ten clients."""
    return min(accuracies)


def stragglers(*, partial: bool) -> Callable[[int], dict[str, Any]]:
    """Half of the clients make one of ten epochs until the deadline."""
    return lambda seed: {
        "simulation": tfr.SimulatedClients(
            slow_fraction=0.5, slow_factor=8, deadline_s=12, partial=partial, seed=seed
        )
    }


def slow(seed: int) -> dict[str, Any]:
    """Three of ten clients take ten times as long."""
    return {"simulation": tfr.SimulatedClients(slow_fraction=0.3, slow_factor=10, spread=0.2, seed=seed)}


DIGITS = {"_target_": "torchfedrpc.experiments.data.digits.digits"}
SKEWED = f"{__name__}.skewed"
COMPARISONS = {
    "label-skew": Comparison(
        "Two classes per client, 10 local epochs, 5 of 10 clients a round",
        "rounds to 85 %",
        DIGITS,
        MLP,
        lambda data, seed: shards(data.train.labels.numpy(), NUM_CLIENTS, seed=seed),
        [
            Method("FedAvg", tfr.FedAvgTrainer),
            Method("SCAFFOLD", tfr.ScaffoldTrainer, "scaffold"),
        ],
        rounds_to(0.85),
        False,
        {"num_rounds": 60, "local_epochs": 10, "clients_per_round": 5},
    ),
    "unequal-clients": Comparison(
        "Dirichlet(0.1) labels and sizes, 5 local epochs, all clients",
        "rounds to 85 %",
        DIGITS,
        MLP,
        lambda data, seed: dirichlet(data.train.labels.numpy(), NUM_CLIENTS, alpha=0.1, min_samples=5, seed=seed),
        [Method("FedAvg", tfr.FedAvgTrainer), Method("FedNova", tfr.FedNovaTrainer)],
        rounds_to(0.85),
        False,
        {"num_rounds": 60, "local_epochs": 5},
    ),
    "stragglers": Comparison(
        "50 % of the clients make 1 of 10 epochs until the deadline, two classes per client",
        "final accuracy",
        DIGITS,
        MLP,
        lambda data, seed: shards(data.train.labels.numpy(), NUM_CLIENTS, seed=seed),
        [
            Method("FedAvg (drops them)", tfr.FedAvgTrainer, given=stragglers(partial=False)),
            Method(
                "FedProx (takes what they have)",
                tfr.FedProxTrainer,
                config={"mu": 0.1},
                given=stragglers(partial=True),
            ),
        ],
        final,
        True,
        {"num_rounds": 30, "local_epochs": 10},
    ),
    "attackers": Comparison(
        "20 % of the clients send ten times the opposite step",
        "final accuracy",
        DIGITS,
        MLP,
        lambda data, seed: iid(data.train.labels.numpy(), NUM_CLIENTS, seed=seed),
        [
            Method("mean", tfr.FedAvgTrainer, Attacked),
            Method(
                "trimmed mean", tfr.FedAvgTrainer, Attacked, given=lambda seed: {"aggregator": tfr.TrimmedMean(0.2)}
            ),
            Method("multi-Krum", tfr.FedAvgTrainer, Attacked, given=lambda seed: {"aggregator": tfr.MultiKrum(2)}),
        ],
        final,
        True,
        {"num_rounds": 20, "local_epochs": 2},
    ),
    "feature-skew": Comparison(
        "Contrast and brightness differ between clients",
        "accuracy of the worst client",
        {"_target_": SKEWED},
        CNN,
        lambda data, seed: iid(data.train.labels.numpy(), NUM_CLIENTS),
        [
            Method("FedAvg", tfr.FedAvgTrainer),
            Method("FedBN", tfr.FedBNTrainer, "fedbn"),
            Method("Ditto", tfr.DittoTrainer, "ditto", config={"penalty": 0.1, "personal_epochs": 2}),
        ],
        worst,
        True,
        {"num_rounds": 10, "local_epochs": 2},
    ),
    "slow-clients": Comparison(
        "30 % of the clients take ten times as long; 5 at a time",
        "virtual seconds to 85 %",
        DIGITS,
        MLP,
        lambda data, seed: iid(data.train.labels.numpy(), NUM_CLIENTS, seed=seed),
        [
            Method("FedAvg", tfr.FedAvgTrainer, config={"clients_per_round": 5}, given=slow),
            Method("FedBuff", tfr.FedBuffTrainer, config={"num_in_flight": 5, "buffer_size": 3}, given=slow),
        ],
        seconds_to(0.85),
        False,
        {"num_rounds": 40, "local_epochs": 1},
    ),
}


async def run(comparison: Comparison, method: Method, rate: float, seed: int) -> float:
    """Return the measure of one run; the worst possible one if it diverges."""
    data = data_of(comparison.dataset["_target_"])
    model = build_model(comparison.model, seed)
    common = {
        "dataset": comparison.dataset,
        "model": comparison.model,
        "batch_size": 20,
        "learning_rate": rate,
        "keep_weights": False,
    }
    parts = comparison.parts(data, seed)
    clients = {
        f"client_{number}": {**common, "indices": np.delete(part, np.s_[::5]), "held_out": part[::5]}
        for number, part in enumerate(parts)
    }
    runtime = {"execution_mode": "local", "trusted_modules": [__name__]}
    rounds: list[tfr.RoundEnded] = []

    def test(weights: Mapping[str, torch.Tensor]) -> dict[str, float]:
        model.load_state_dict(weights)
        return {"accuracy": score(model, data.test).accuracy}

    async with tfr.LearnerProxy(method.learner, clients, runtime=runtime, seed=seed) as proxy:
        trainer = method.trainer(
            {"seed": seed, **comparison.settings, **method.config},
            proxy,
            initial_weights=copy_weights(model),
            buffers=[name for name, _ in model.named_buffers()],
            score=test,
            history=rounds,
            **method.given(seed),
        )
        try:
            weights = await trainer.train()
        except (FloatingPointError, tfr.GroupCallError):
            return -math.inf if comparison.more_is_better else math.inf
        scores = await proxy.clients().evaluate(model_weights=weights)
    accuracies = [result["accuracy"] for result in scores.values()]
    return comparison.result([dict(one.metrics) for one in rounds], accuracies)


def compare(comparison: Comparison, num_seeds: int) -> dict[str, tuple[float, list[float]]]:
    """Return each algorithm's learning rate, and its measures."""
    sign = 1 if comparison.more_is_better else -1
    results = {}
    for method in comparison.methods:
        tuned = {rate: sign * asyncio.run(run(comparison, method, rate, TUNING_SEED)) for rate in RATES}
        rate = max(tuned, key=lambda one: tuned[one])
        results[method.name] = rate, [asyncio.run(run(comparison, method, rate, seed)) for seed in range(num_seeds)]
    return results


def main() -> None:
    """Print the table, and draw the picture."""
    parser = argparse.ArgumentParser("scripts/bench/methods", description=__doc__)
    parser.add_argument("names", nargs="*", help=f"comparisons; default: all of {', '.join(COMPARISONS)}")
    parser.add_argument("--seeds", type=int, default=5, help="number of seeds; default: 5")
    parser.add_argument("--picture", type=Path, metavar="FILE", help="picture, such as docs/methods.png")
    options = parser.parse_args()
    chosen = {name: COMPARISONS[name] for name in options.names or COMPARISONS}
    print(
        "| task | measure | algorithm | learning rate | mean | std | each seed |\n"
        "| --- | --- | --- | --- | --- | --- | --- |"
    )
    found = {}
    for name, comparison in chosen.items():
        found[name] = compare(comparison, options.seeds)
        for method, (rate, values) in found[name].items():
            spread = statistics.stdev(values) if len(values) > 1 else 0.0
            each = " ".join(f"{value:.3g}" for value in values)
            row = (
                comparison.title,
                comparison.measure,
                method,
                f"{rate:g}",
                f"{statistics.fmean(values):.3g}",
                f"{spread:.2g}",
                each,
            )
            print(f"| {' | '.join(row)} |", flush=True)
    if options.picture is not None:
        draw(found, options.picture)


def draw(found: Mapping[str, Mapping[str, tuple[float, list[float]]]], path: Path) -> None:
    """Draw each comparison's runs: a point for each seed, and a line at the mean."""
    figure, grid = plt.subplots(2, math.ceil(len(found) / 2), figsize=(11, 6), squeeze=False, layout="constrained")
    for axes, (name, methods) in zip(grid.flat, found.items(), strict=False):
        for place, (method, (_, values)) in enumerate(methods.items()):
            axes.plot(values, [place] * len(values), "o", alpha=0.6, color=f"C{place}")
            axes.plot([statistics.fmean(values)] * 2, [place - 0.25, place + 0.25], color=f"C{place}", linewidth=2)
            axes.text(0.01, place + 0.3, method, transform=axes.get_yaxis_transform(), fontsize=9)
        axes.set_yticks([])
        axes.set_ylim(-0.6, len(methods) - 0.2)
        axes.set_xlabel(COMPARISONS[name].measure)
        axes.set_title(name.replace("-", " "), fontsize=10)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
