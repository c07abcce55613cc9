"""Compare algorithms where their papers say that they differ: five seeds each, tuned alike.

Each algorithm has the learning rate, and where it has one the second setting, with the best mean over three seeds
that are not among those. A seed decides partition, initial weights, cohorts, and which clients are slow. Data are the
digits of scikit-learn and synthetic images; everything runs in local mode.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import math
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import cache
from itertools import product
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
from torchfedrpc.federation.simulation import SimulatedRound

logger = logging.getLogger("methods")

NUM_CLIENTS = 10
RATES = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0)
TUNING_SEEDS = (100, 101, 102)
TARGET = 0.85
ATTACKERS = ("client_0", "client_5")
DIGITS = {"_target_": "torchfedrpc.experiments.data.digits.digits"}
SKEWED = {"_target_": f"{__name__}.skewed"}
MLP: dict[str, Any] = {"_target_": "torchfedrpc.experiments.models.MLP"}
CNN: dict[str, Any] = {"_target_": "torchfedrpc.experiments.models.ConvNet", "channels": [4, 8], "batch_norm": True}

MEASURES: dict[str, Callable[[Sequence[Mapping[str, float]], Sequence[float]], float]] = {
    "rounds to 85 %": lambda rounds, accuracies: len(rounds),
    "virtual seconds to 85 %": lambda rounds, accuracies: rounds[-1]["simulated_seconds"],
    "final accuracy": lambda rounds, accuracies: statistics.fmean(one["accuracy"] for one in rounds[-5:]),
    "accuracy of the worst client": lambda rounds, accuracies: min(accuracies),
}
"""Name of a measure -> function of a run's rounds, and of the clients' accuracies on samples of their own."""


@dataclass(frozen=True)
class Method:
    """An algorithm as it takes part in a comparison.

    Attributes:
        name: Its name in the table.
        trainer: Class of the trainer.
        learner: Registered name, or class, of the learner.
        config: Settings of the trainer that are fixed.
        tuned: Name of a second setting that is tuned, and its values.
        given: Keyword arguments of the trainer, made for each run.
        rates: Learning rates to choose from.
    """

    name: str
    trainer: type[tfr.FedAvgTrainer]
    learner: Any = "classification"
    config: Mapping[str, Any] = field(default_factory=dict)
    tuned: tuple[str, Sequence[float]] = ("", (0.0,))
    given: Callable[[int], dict[str, Any]] = lambda seed: {}
    rates: Sequence[float] = RATES

    def choices(self) -> list[dict[str, float]]:
        """Return the settings to choose from."""
        name, values = self.tuned
        further: list[dict[str, float]] = [{name: value} if name else {} for value in values]
        return [{"learning_rate": rate, **one} for one, rate in product(further, self.rates)]


@dataclass(frozen=True)
class Comparison:
    """Algorithms on one task.

    Attributes:
        title: What is compared.
        measure: Name of the measure of a run, one of `MEASURES`.
        parts: Returns each client's indices, from the labels and a seed.
        settings: Settings of all trainers.
        methods: The algorithms; the first one is the baseline.
        dataset: Recipe of the data.
        model: Recipe of the model.
    """

    title: str
    measure: str
    parts: Callable[[Any, int], Sequence[Any]]
    settings: Mapping[str, Any]
    methods: Sequence[Method]
    dataset: Mapping[str, Any] = field(default_factory=lambda: DIGITS)
    model: Mapping[str, Any] = field(default_factory=lambda: MLP)

    @property
    def has_target(self) -> bool:
        """Whether a run ends at the target, and less of the measure is better; else more is."""
        return " to " in self.measure


class RandomEpochs(tfr.SimulatedClients):
    """Clients that make 2 to 5 local epochs, drawn in each round, as in table 1 of FedNova's paper."""

    def plan(self, cohort: Sequence[str], round_num: int, num_epochs: int) -> SimulatedRound:
        """Return the epochs of each client."""
        drawn = np.random.default_rng([self.seed, round_num]).integers(2, 6, len(cohort))
        return SimulatedRound(dict(zip(cohort, drawn.tolist(), strict=True)), [], 0.0)


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
    made: tfr.TrainTest = digits() if target == DIGITS["_target_"] else skewed()
    return made


def stragglers(*, partial: bool) -> Callable[[int], dict[str, Any]]:
    """Half of the clients make one of ten epochs until the deadline."""
    common: dict[str, Any] = {"slow_fraction": 0.5, "slow_factor": 8, "deadline_s": 12, "partial": partial}
    return lambda seed: {"simulation": tfr.SimulatedClients(seed=seed, **common)}


def slow_clients(seed: int) -> dict[str, Any]:
    """Three of ten clients take ten times as long."""
    return {"simulation": tfr.SimulatedClients(slow_fraction=0.3, slow_factor=10, spread=0.2, seed=seed)}


def given(aggregator: Any) -> Callable[[int], dict[str, Any]]:
    """Give a trainer an aggregator."""
    return lambda seed: {"aggregator": aggregator}


def random_epochs(seed: int) -> dict[str, Any]:
    """Give a trainer clients with random numbers of epochs."""
    return {"simulation": RandomEpochs(seed=seed)}


COMPARISONS = {
    "label-skew": Comparison(
        "Two classes per client, 10 local epochs, 5 of 10 clients a round",
        "rounds to 85 %",
        lambda labels, seed: shards(labels, NUM_CLIENTS, seed=seed),
        {"num_rounds": 60, "local_epochs": 10, "clients_per_round": 5},
        [Method("FedAvg", tfr.FedAvgTrainer), Method("SCAFFOLD", tfr.ScaffoldTrainer, "scaffold")],
    ),
    "unequal-steps": Comparison(
        "16 clients, Dirichlet(0.1) labels and sizes, 2 to 5 local epochs at random",
        "rounds to 85 %",
        lambda labels, seed: dirichlet(labels, 16, alpha=0.1, min_samples=5, seed=seed),
        {"num_rounds": 60},
        [
            Method("FedAvg", tfr.FedAvgTrainer, given=random_epochs),
            Method("FedNova", tfr.FedNovaTrainer, given=random_epochs),
            Method("FedAvg, not tuned", tfr.FedAvgTrainer, given=random_epochs, rates=(0.03,)),
            Method("FedNova, not tuned", tfr.FedNovaTrainer, given=random_epochs, rates=(0.03,)),
        ],
    ),
    "stragglers": Comparison(
        "Two classes per client, 5 of 10 clients make 1 of 10 local epochs until the deadline",
        "final accuracy",
        lambda labels, seed: shards(labels, NUM_CLIENTS, seed=seed),
        {"num_rounds": 30, "local_epochs": 10},
        [
            Method("FedAvg, drops them", tfr.FedAvgTrainer, given=stragglers(partial=False)),
            Method("FedAvg, takes their epoch", tfr.FedAvgTrainer, given=stragglers(partial=True)),
            Method(
                "FedProx, takes their epoch",
                tfr.FedProxTrainer,
                tuned=("mu", (0.01, 0.1, 1.0)),
                given=stragglers(partial=True),
            ),
        ],
    ),
    "attackers": Comparison(
        "2 of 10 clients send ten times the opposite step",
        "final accuracy",
        lambda labels, seed: iid(labels, NUM_CLIENTS, seed=seed),
        {"num_rounds": 20, "local_epochs": 2},
        [
            Method("mean", tfr.FedAvgTrainer, Attacked),
            Method("trimmed mean", tfr.FedAvgTrainer, Attacked, given=given(tfr.TrimmedMean(0.2))),
            Method("Krum", tfr.FedAvgTrainer, Attacked, given=given(tfr.MultiKrum(2, num_selected=1))),
            Method("multi-Krum", tfr.FedAvgTrainer, Attacked, given=given(tfr.MultiKrum(2))),
        ],
    ),
    "feature-skew": Comparison(
        "Contrast and brightness differ between clients",
        "accuracy of the worst client",
        lambda labels, seed: iid(labels, NUM_CLIENTS),
        {"num_rounds": 10, "local_epochs": 2},
        [
            Method("FedAvg", tfr.FedAvgTrainer),
            Method("FedBN", tfr.FedBNTrainer, "fedbn"),
            Method("Ditto", tfr.DittoTrainer, "ditto", {"personal_epochs": 2}, ("penalty", (0.05, 0.1, 1.0))),
        ],
        SKEWED,
        CNN,
    ),
    "slow-clients": Comparison(
        "3 of 10 clients take ten times as long; 5 train at a time",
        "virtual seconds to 85 %",
        lambda labels, seed: iid(labels, NUM_CLIENTS, seed=seed),
        {"num_rounds": 60, "local_epochs": 1},
        [
            Method("FedAvg", tfr.FedAvgTrainer, config={"clients_per_round": 5}, given=slow_clients),
            Method("FedBuff", tfr.FedBuffTrainer, config={"num_in_flight": 5, "buffer_size": 3}, given=slow_clients),
        ],
    ),
}


async def run(comparison: Comparison, method: Method, chosen: Mapping[str, float], seed: int) -> float:
    """Return the measure of one run with chosen settings: the learning rate, and perhaps one of the trainer.

    A run that diverges has accuracy 0; it, and one that does not reach its target, has infinite rounds and seconds.
    """
    data = data_of(comparison.dataset["_target_"])
    model = build_model(comparison.model, seed)
    rate, further = chosen["learning_rate"], {name: chosen[name] for name in chosen if name != "learning_rate"}
    common = {
        "dataset": comparison.dataset,
        "model": comparison.model,
        "batch_size": 20,
        "learning_rate": rate,
        "keep_weights": False,
    }
    clients = {
        f"client_{number}": {**common, "indices": np.delete(part, np.s_[::5]), "held_out": part[::5]}
        for number, part in enumerate(comparison.parts(data.train.labels.numpy(), seed))
    }
    runtime = {"execution_mode": "local", "trusted_modules": [__name__]}
    history: list[tfr.RoundEnded] = []

    def test(weights: Mapping[str, torch.Tensor]) -> dict[str, float]:
        model.load_state_dict(weights)
        return {"accuracy": score(model, data.test).accuracy}

    async with tfr.LearnerProxy(method.learner, clients, runtime=runtime, seed=seed) as proxy:
        trainer = method.trainer(
            {"seed": seed, **comparison.settings, **method.config, **further},
            proxy,
            initial_weights=copy_weights(model),
            buffers=[name for name, _ in model.named_buffers()],
            score=test,
            history=history,
            **method.given(seed),
        )
        if comparison.has_target:
            trainer.callbacks = [tfr.EarlyStopping("accuracy", patience=None, target=TARGET)]
        scores: Mapping[str, dict[str, float]] = {}
        try:
            scores = await proxy.clients().evaluate(model_weights=await trainer.train())
        except* FloatingPointError as errors:
            logger.debug("%s with %s and seed %d: %s", method.name, chosen, seed, errors.exceptions[0])
    rounds = [one.metrics for one in history]
    if not scores or (comparison.has_target and rounds[-1]["accuracy"] < TARGET):
        return math.inf if comparison.has_target else 0.0
    return float(MEASURES[comparison.measure](rounds, [result["accuracy"] for result in scores.values()]))


def measure(name: str, number: int, chosen: Mapping[str, float], seed: int) -> float:
    """Return the measure of one run, in a process of a pool."""
    logging.getLogger("torchfedrpc").setLevel(logging.ERROR)
    return asyncio.run(run(COMPARISONS[name], COMPARISONS[name].methods[number], chosen, seed))


def compare(name: str, num_seeds: int, pool: Executor) -> dict[str, dict[str, Any]]:
    """Return each algorithm's settings, the means that they were chosen by, and its measure for each seed."""
    comparison = COMPARISONS[name]
    best_of = min if comparison.has_target else max

    def start(number: int, chosen: Mapping[str, float], seeds: Iterable[int]) -> list[Future[float]]:
        return [pool.submit(measure, name, number, chosen, seed) for seed in seeds]

    trials = [
        [start(number, chosen, TUNING_SEEDS) for chosen in method.choices()]
        for number, method in enumerate(comparison.methods)
    ]
    found = []
    for number, method in enumerate(comparison.methods):
        means = [statistics.fmean(one.result() for one in runs) for runs in trials[number]]
        best = [place for place, mean in enumerate(means) if mean == best_of(means)]
        chosen = method.choices()[best[len(best) // 2]]  # of equals the one in the middle
        logger.info("%s, %s: %s by %s", name, method.name, chosen, " ".join(f"{mean:.3g}" for mean in means))
        found.append((method.name, chosen, means, start(number, chosen, range(num_seeds))))
    return {
        method: {"chosen": chosen, "tuning": means, "values": [one.result() for one in runs]}
        for method, chosen, means, runs in found
    }


def summary(values: Sequence[float], *, has_target: bool) -> str:
    """Return mean and spread, and how many runs reach the target; without a mean if some do not."""
    num_reached = sum(map(math.isfinite, values))
    spread = f" ± {statistics.stdev(values):.2g}" if len(values) > 1 and num_reached == len(values) else ""
    mean = f"{statistics.fmean(values):.3g}{spread}"
    reached = f"{num_reached} of {len(values)} reached"
    return (f"{mean}, {reached}" if num_reached == len(values) else reached) if has_target else mean


def table(found: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> str:
    """Return the table, in Markdown."""
    lines = ["| task | measure | algorithm | settings | mean ± std | each seed |", "| --- " * 6 + "|"]
    for comparison, methods in ((COMPARISONS[name], methods) for name, methods in found.items()):
        for method, one in methods.items():
            chosen = ", ".join(f"{key.replace('_', ' ')} {value:g}" for key, value in one["chosen"].items())
            each = " ".join(f"{value:.3g}" for value in one["values"])
            mean = summary(one["values"], has_target=comparison.has_target)
            lines.append(f"| {comparison.title} | {comparison.measure} | {method} | {chosen} | {mean} | {each} |")
    return "\n".join(lines)


def main() -> None:
    """Print the table, and draw the picture."""
    parser = argparse.ArgumentParser("scripts/bench/methods", description=__doc__)
    parser.add_argument("names", nargs="*", help=f"comparisons; default: all of {', '.join(COMPARISONS)}")
    parser.add_argument("--seeds", type=int, default=5, help="number of seeds; default: 5")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="number of processes; default: of cores")
    parser.add_argument("--picture", type=Path, metavar="FILE", help="picture, such as docs/methods.png")
    parser.add_argument(
        "--results", type=Path, metavar="FILE", help="all measures, such as scripts/bench/results/methods.json"
    )
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    start = time.monotonic()
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(options.jobs, context, torch.set_num_threads, (1,)) as pool:
        found = {name: compare(name, options.seeds, pool) for name in options.names or COMPARISONS}
    logger.info("%.1f min with %d processes", (time.monotonic() - start) / 60, options.jobs)
    print(table(found))
    if options.results is not None:
        options.results.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    if options.picture is not None:
        draw(found, options.picture)


def draw(found: Mapping[str, Mapping[str, Mapping[str, Any]]], path: Path) -> None:
    """Draw each comparison's runs: a point for each seed, and a line at the mean of all, if all reach the target."""
    figure, grid = plt.subplots(2, math.ceil(len(found) / 2), figsize=(11, 6), squeeze=False, layout="constrained")
    for axes, (name, methods) in zip(grid.flat, found.items(), strict=False):
        for place, (method, one) in enumerate(methods.items()):
            reached = [value for value in one["values"] if math.isfinite(value)]
            axes.plot(reached, [place] * len(reached), "o", alpha=0.6, color=f"C{place}")
            label = method
            if len(reached) == len(one["values"]):
                mean = statistics.fmean(reached)
                axes.plot([mean] * 2, [place - 0.2, place + 0.2], color=f"C{place}", linewidth=2)
            else:
                label += f" ({len(reached)} of {len(one['values'])} reached)"
            axes.text(0.01, place + 0.3, label, transform=axes.get_yaxis_transform(), fontsize=9)
        axes.set_yticks([])
        axes.set_ylim(-0.6, len(methods) - 0.2)
        axes.set_xlabel(COMPARISONS[name].measure)
        axes.set_title(name.replace("-", " "), fontsize=10)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
