"""Each bundled algorithm has the same bits in every mode, after the kill of a worker, and across a resume."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import torchfedrpc as tfr
from torchfedrpc.experiments.training import build_model, copy_weights

CLIENTS = [f"client_{number}" for number in range(4)]
MODEL = {"_target_": "torchfedrpc.experiments.models.ConvNet", "channels": [2, 3], "batch_norm": True}
DATASET = {"_target_": "torchfedrpc.experiments.data.synthetic.synthetic", "num_samples": 120}
NUM_ROUNDS = 4
ALGORITHMS: dict[str, tuple[type[tfr.FedAvgTrainer], str, dict[str, Any]]] = {
    "fedavg": (tfr.FedAvgTrainer, "classification", {}),
    "fedprox": (tfr.FedProxTrainer, "classification", {"mu": 0.1}),
    "fedavgm": (tfr.FedAvgMTrainer, "classification", {}),
    "fedadagrad": (tfr.FedAdagradTrainer, "classification", {}),
    "fedadam": (tfr.FedAdamTrainer, "classification", {}),
    "fedyogi": (tfr.FedYogiTrainer, "classification", {}),
    "scaffold": (tfr.ScaffoldTrainer, "scaffold", {"server_learning_rate": 0.9}),
    "fednova": (tfr.FedNovaTrainer, "classification", {}),
    "fedbn": (tfr.FedBNTrainer, "fedbn", {}),
    "ditto": (tfr.DittoTrainer, "ditto", {}),
    "top_k": (tfr.FedAvgTrainer, "classification", {"compression": "top_k", "compression_ratio": 0.1}),
    "gaussian": (tfr.FedBNTrainer, "fedbn", {}),
    "fedbuff": (tfr.FedBuffTrainer, "classification", {"buffer_size": 3, "num_in_flight": 4}),
}
AGGREGATORS: dict[str, Callable[[], Any]] = {
    "mean": lambda: None,
    "median": tfr.CoordinateMedian,
    "trimmed_mean": lambda: tfr.TrimmedMean(0.3),
    "multi_krum": lambda: tfr.MultiKrum(0, 2),
}
OWN: dict[str, Callable[[], Any]] = {"gaussian": lambda: tfr.GaussianMean(0.5, 0.1, seed=5, delta=None)}
"""Algorithm -> its aggregator, where that is another one than the mean."""
Result = tuple[dict[str, Tensor], list[Any]]


class KillsAWorker(tfr.Callback):
    """Kills a worker once, at an end of a round."""

    async def on_round_end(self, run: tfr.Run, ended: tfr.RoundEnded) -> None:
        if ended.round_num == 1:
            os.kill(run.proxy.stats()["workers"]["worker1"]["pid"], signal.SIGKILL)


class Stops(tfr.Callback):
    """Ends a run after two rounds."""

    def on_round_end(self, run: tfr.Run, ended: tfr.RoundEnded) -> None:
        if ended.round_num == 1:
            run.stop("a test")


async def train(
    name: str,
    runtime: Any,
    *,
    aggregator: str = "mean",
    callbacks: list[tfr.Callback] | None = None,
    folder: Path | None = None,
) -> Result:
    """The final weights, and each client's score."""
    trainer, learner, config = ALGORITHMS[name]
    model = build_model(MODEL, 3)
    momentum = 0.0 if name == "scaffold" else 0.5
    common = {"dataset": DATASET, "model": MODEL, "batch_size": 8, "momentum": momentum, "learning_rate": 0.05}
    shares = np.array_split(np.arange(96), len(CLIENTS))
    clients = {name: {**common, "indices": share} for name, share in zip(CLIENTS, shares, strict=True)}
    async with tfr.LearnerProxy(learner, clients, runtime=runtime, seed=2) as proxy:
        made = trainer(
            {"num_rounds": NUM_ROUNDS, "clients_per_round": None if name == "fedbuff" else 3, **config},
            proxy,
            initial_weights=copy_weights(model),
            buffers=[buffer for buffer, _ in model.named_buffers()],
            simulation=tfr.SimulatedClients(slow_fraction=0.5, spread=0.3, seed=1) if name == "fedbuff" else None,
            aggregator=OWN.get(name, AGGREGATORS[aggregator])(),
        )
        made.callbacks = callbacks or []
        if folder is not None:
            made.checkpoints = tfr.Checkpoints(folder, resume="auto")
        weights = await made.train()
        assert weights is not None
        scores = await proxy.clients().evaluate(model_weights=weights)
        return dict(weights), [scores, [ended.metrics for ended in made.history]]  # type: ignore[attr-defined]


def check_equal(found: Result, expected: Result, *, num_last: int = NUM_ROUNDS) -> None:
    assert found[0].keys() == expected[0].keys()
    for name, value in expected[0].items():
        assert torch.equal(found[0][name], value), name
    assert dict(found[1][0]) == dict(expected[1][0])
    assert found[1][1][-num_last:] == expected[1][1][-num_last:]


_LOCAL: dict[str, Result] = {}


async def locally(name: str, aggregator: str = "mean") -> Result:
    """The result of local mode, which is computed once."""
    key = f"{name} {aggregator}"
    if key not in _LOCAL:
        _LOCAL[key] = await train(name, "local", aggregator=aggregator)
    return _LOCAL[key]


@pytest.mark.parametrize("name", ALGORITHMS)
async def test_algorithms_have_the_same_bits_in_every_mode(name: str, runtime: Mapping[str, Any]) -> None:
    expected = await locally(name)
    assert all(value.isfinite().all() for value in expected[0].values())
    check_equal(await train(name, runtime), expected)


@pytest.mark.parametrize("aggregator", AGGREGATORS)
@pytest.mark.parametrize("name", ["fedavg", "scaffold", "fednova", "fedbuff"])
async def test_robust_aggregators_have_the_same_bits_in_every_mode(
    name: str, aggregator: str, runtime: Mapping[str, Any]
) -> None:
    check_equal(await train(name, runtime, aggregator=aggregator), await locally(name, aggregator))


@pytest.mark.parametrize("name", ALGORITHMS)
async def test_algorithms_go_on_with_the_same_bits(
    name: str, lone_runtime: Mapping[str, Any], tmp_path: Path
) -> None:
    await train(name, lone_runtime, callbacks=[Stops()], folder=tmp_path)
    check_equal(await train(name, lone_runtime, folder=tmp_path), await locally(name))


@pytest.mark.parametrize("name", ALGORITHMS)
async def test_algorithms_have_the_same_bits_after_the_kill_of_a_worker(
    name: str, mode: str, runtime: Mapping[str, Any]
) -> None:
    if mode != "pseudo":
        pytest.skip("a test kills workers of pseudo mode alone")
    check_equal(await train(name, runtime, callbacks=[KillsAWorker()]), await locally(name))


class Recorder(tfr.Callback):
    """Records the metrics of the rounds by their numbers."""

    def __init__(self) -> None:
        self.rounds: dict[int, dict[str, float]] = {}

    def on_round_end(self, run: tfr.Run, ended: tfr.RoundEnded) -> None:
        self.rounds[ended.round_num] = ended.metrics


_EVALUATED: dict[str, tuple[Result, dict[int, dict[str, float]]]] = {}


async def evaluated(
    name: str, runtime: Any, *others: tfr.Callback, folder: Path | None = None
) -> tuple[Result, dict[int, dict[str, float]]]:
    """The result of a run with evaluations by the clients, and the metrics of its rounds."""
    recorder = Recorder()
    callbacks = [tfr.ClientEvaluation(2), recorder, *others]
    return await train(name, runtime, callbacks=callbacks, folder=folder), recorder.rounds


async def evaluated_locally(name: str) -> tuple[Result, dict[int, dict[str, float]]]:
    if name not in _EVALUATED:
        _EVALUATED[name] = await evaluated(name, "local")
    return _EVALUATED[name]


@pytest.mark.parametrize("name", ALGORITHMS)
async def test_evaluations_by_clients_have_the_same_bits_in_every_mode_and_after_the_kill_of_a_worker(
    name: str, mode: str, runtime: Mapping[str, Any]
) -> None:
    expected, expected_rounds = await evaluated_locally(name)
    assert [number for number, metrics in expected_rounds.items() if "client_accuracy" in metrics] == [0, 1, 3]
    result, rounds = await evaluated(name, runtime, *([KillsAWorker()] if mode == "pseudo" else []))
    assert rounds == expected_rounds
    check_equal(result, expected)


@pytest.mark.parametrize("name", ALGORITHMS)
async def test_training_has_the_same_bits_with_evaluations_by_clients_and_without(name: str) -> None:
    check_equal((await evaluated_locally(name))[0], await locally(name))


@pytest.mark.parametrize("name", ["fedavg", "ditto", "fedbuff"])
async def test_evaluations_by_clients_have_the_same_bits_across_a_resume(
    name: str, lone_runtime: Mapping[str, Any], tmp_path: Path
) -> None:
    await evaluated(name, lone_runtime, Stops(), folder=tmp_path)
    expected, expected_rounds = await evaluated_locally(name)
    result, rounds = await evaluated(name, lone_runtime, folder=tmp_path)
    assert rounds == {number: metrics for number, metrics in expected_rounds.items() if number >= 2}
    check_equal(result, expected, num_last=2)
