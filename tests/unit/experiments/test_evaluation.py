"""Evaluation in an experiment: held-out samples of clients, and the metrics of their scores."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import torchfedrpc as tfr
from torchfedrpc.config import RuntimeConfig
from torchfedrpc.experiments import experiment
from torchfedrpc.experiments.data.held_out import split_held_out
from torchfedrpc.experiments.experiment import run_experiment
from torchfedrpc.experiments.experiment_config import ExperimentConfig
from torchfedrpc.experiments.training import build_model, copy_weights

DATASET = {"_target_": "torchfedrpc.experiments.data.synthetic.synthetic", "num_samples": 60}
MODEL = {"_target_": "torchfedrpc.experiments.models.LogisticRegression"}
CLASSIFICATION = "torchfedrpc.experiments.learners.classification.ClassificationLearner"


@pytest.fixture(autouse=True)
def _no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """matplotlib keeps fonts open."""
    monkeypatch.setattr(experiment, "_draw", lambda *_: None)


def uneven(labels: Any, num_clients: int) -> list[Any]:
    """Shares of 1, 10 and 11 samples."""
    return np.split(np.arange(22), [1, 11])


class Silent:
    """A learner without held-out samples, whose method has another name."""

    def __init__(self, client_id: str, indices: Any) -> None: ...

    def evaluat(self) -> None: ...


def config(**values: Any) -> ExperimentConfig:
    return ExperimentConfig.of(
        {
            "seed": 0,
            "runtime": RuntimeConfig(execution_mode="local", num_clients=3, trusted_modules=[__name__]),
            "dataset": DATASET,
            "partition": {"_target_": f"{__name__}.uneven"},
            "model": MODEL,
            "learner": {"_target_": CLASSIFICATION},
            "trainer": {"_target_": "torchfedrpc.FedAvgTrainer", "num_rounds": 1},
            "checkpoint_every": None,
            **values,
        }
    )


@pytest.mark.parametrize(
    ("num_samples", "fraction", "num_held_out"),
    [(10, 0.2, 2), (10, 0.0, 0), (1, 0.9, 0), (2, 0.99, 1), (2, 0.2, 0), (3, 0.2, 1), (0, 0.5, 0)],
)
def test_held_out_samples_are_a_fraction_that_leaves_one_to_train_on(
    num_samples: int, fraction: float, num_held_out: int
) -> None:
    share = np.arange(num_samples, dtype=np.int64) * 3
    training, held_out = split_held_out({"a": share}, fraction, seed=4)
    assert len(held_out["a"]) == num_held_out
    assert sorted([*training["a"], *held_out["a"]]) == share.tolist()


def test_held_out_samples_depend_on_seed_and_client_and_keep_their_order() -> None:
    shares = {name: np.arange(100, dtype=np.int64)[::-1] for name in "ab"}
    training, held_out = split_held_out(shares, 0.3, seed=4)
    again = split_held_out(shares, 0.3, seed=4)[1]
    assert all(np.array_equal(again[name], held_out[name]) for name in "ab")
    assert not np.array_equal(held_out["a"], held_out["b"])
    assert not np.array_equal(held_out["a"], split_held_out(shares, 0.3, seed=5)[1]["a"])
    assert all((np.diff(part) < 0).all() for part in (training["a"], held_out["a"]))


@pytest.mark.parametrize("learner", ["classification", "fedbn", "ditto", "scaffold"])
async def test_learners_train_on_their_indices_and_score_held_out_samples(learner: str) -> None:
    model = {"_target_": "torchfedrpc.experiments.models.ConvNet", "channels": [2, 3], "batch_norm": True}
    common = {"dataset": DATASET, "model": model, "indices": np.arange(8)}
    settings: dict[str, dict[str, Any]] = {
        "fedbn": {"personal": []},
        "ditto": {"penalty": 1.0},
        "scaffold": {"server_control": {}},
    }
    clients = {
        "a": {**common, "held_out": np.arange(8, 11)},
        "b": {**common, "indices": np.arange(8, 11)},
        "c": common,
        "d": {**common, "held_out": np.arange(0)},
    }
    weights = copy_weights(build_model(model, 0))
    async with tfr.LearnerProxy(learner, clients, runtime="local") as proxy:
        scores = await proxy.clients().evaluate(model_weights=weights)
        results = await proxy.clients(["a", "c"]).train_epoch(model_weights=weights, **settings.get(learner, {}))
    assert scores["a"] == scores["b"]
    assert scores["a"]["num_samples"] == 3
    assert scores["c"]["num_samples"] == 8
    assert scores["d"] == {"accuracy": 0.0, "loss": 0.0, "num_samples": 0}
    assert results["a"]["num_samples"] == results["c"]["num_samples"] == 8


async def test_an_experiment_divides_shares_and_leaves_clients_without_held_out_samples_unscored(
    tmp_path: Path,
) -> None:
    await run_experiment(config(held_out=0.2, client_scores=True, report=True), tmp_path)
    records = [json.loads(line) for line in (tmp_path / "clients.jsonl").read_text().splitlines()]
    assert [record["num_samples"] for record in records] == [1, 8, 9]
    assert [record["num_held_out"] for record in records] == [0, 2, 2]
    assert [set(record.get("scores", {})) for record in records] == [
        set(),
        {"accuracy", "loss"},
        {"accuracy", "loss"},
    ]
    assert (tmp_path / "report.html").exists()


async def test_an_experiment_without_held_out_samples_scores_those_to_train_on(tmp_path: Path) -> None:
    await run_experiment(config(client_scores=True), tmp_path)
    records = [json.loads(line) for line in (tmp_path / "clients.jsonl").read_text().splitlines()]
    assert [record["num_samples"] for record in records] == [1, 10, 11]
    assert all("num_held_out" not in record and record["scores"] for record in records)


async def test_the_baseline_trains_on_no_held_out_sample(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    monkeypatch.setattr(experiment, "train_centrally", lambda **given: seen.append(given["data"]) or [])
    for held_out in (0.0, 0.2):
        await run_experiment(config(held_out=held_out, baseline={"num_rounds": 1}), tmp_path / str(held_out))
    assert [len(data.train.labels) for data in seen] == [50, 18]
    shares = dict(zip("abc", uneven(None, 3), strict=True))
    indices = np.concatenate([*split_held_out(shares, 0.2, 0)[0].values()])
    assert torch.equal(seen[1].train.inputs, seen[0].train.inputs[torch.from_numpy(indices)])


@pytest.mark.parametrize("held_out", [1.0, -0.1, True, "some", float("nan")])
def test_a_fraction_that_leaves_nothing_to_train_on_is_refused(held_out: Any) -> None:
    with pytest.raises(tfr.ConfigError, match=r"held_out is the fraction of .*, at least 0 and below 1, not"):
        config(held_out=held_out)


async def test_a_learner_that_takes_no_held_out_samples_is_refused(tmp_path: Path) -> None:
    silent = {"_target_": f"{__name__}.Silent"}
    with pytest.raises(tfr.ConfigError, match=r"Silent takes no held_out, and .* or set held_out=0"):
        await run_experiment(config(learner=silent, held_out=0.1), tmp_path)


async def test_the_history_has_the_metrics_of_clients_with_held_out_samples(tmp_path: Path) -> None:
    trainer = {"_target_": "torchfedrpc.FedAvgTrainer", "num_rounds": 3}
    best = {"best": {"_target_": "torchfedrpc.BestModel", "metric": "client_accuracy_worst_decile"}}
    settings = {"trainer": trainer, "callbacks": best, "report": True, "client_scores": True}
    await run_experiment(config(held_out=0.2, evaluate_every=3, **settings), tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "history.jsonl").read_text().splitlines()]
    assert ["client_accuracy" in line for line in lines] == [True, False, True]
    clients = [json.loads(line) for line in (tmp_path / "clients.jsonl").read_text().splitlines()]
    for name in ("accuracy", "loss"):
        found = [client["scores"][name] for client in clients[1:]]
        assert lines[2][f"client_{name}"] == pytest.approx(sum(found) / 2)
        assert lines[2][f"client_{name}_spread"] == pytest.approx(abs(found[0] - found[1]) / 2)
    best_round = torch.load(tmp_path / "best.pt", weights_only=True)
    assert best_round["value"] == lines[best_round["round"]]["client_accuracy_worst_decile"]
    assert "client accuracy worst decile" in (tmp_path / "report.html").read_text()


async def test_a_learner_without_evaluate_is_refused_where_clients_evaluate(tmp_path: Path) -> None:
    silent = {"_target_": f"{__name__}.Silent"}
    with pytest.raises(
        tfr.ConfigError,
        match=r"Silent: the method evaluate is missing, which evaluate_every calls.*did you mean 'evaluat'",
    ):
        await run_experiment(config(learner=silent, evaluate_every=1), tmp_path)


def targets(metric: str, target: float) -> dict[str, Any]:
    stopping = {"_target_": "torchfedrpc.EarlyStopping", "metric": metric, "patience": None, "target": target}
    return {"callbacks": {"target": stopping}}


async def test_a_run_ends_at_its_target_and_tells_what_it_has_cost(tmp_path: Path) -> None:
    trainer = {"_target_": "torchfedrpc.FedAvgTrainer", "num_rounds": 9}
    simulation = {"_target_": "torchfedrpc.SimulatedClients"}
    printed = io.StringIO()
    settings = {"trainer": trainer, "simulation": simulation, **targets("client_accuracy_weighted", 0.001)}
    await run_experiment(config(evaluate_every=2, **settings), tmp_path, stream=printed)
    (line,) = [json.loads(line) for line in (tmp_path / "history.jsonl").read_text().splitlines()]
    cost = f"1 round, {line['seconds']:.1f} s, {line['simulated_seconds']:.1f} simulated s"
    assert f"to the target client_accuracy_weighted of 0.001: {cost}\n" in printed.getvalue()  # local: no traffic


async def test_a_run_that_does_not_reach_its_target_says_so(tmp_path: Path) -> None:
    printed = io.StringIO()
    trainer = {"_target_": "torchfedrpc.FedAvgTrainer", "num_rounds": 2}
    await run_experiment(config(trainer=trainer, **targets("test_loss", -1.0)), tmp_path, stream=printed)
    assert "the target test_loss of -1 was not reached\n" in printed.getvalue()


async def test_an_unknown_metric_of_clients_is_an_error_with_the_nearest(tmp_path: Path) -> None:
    message = r"no metric 'clients_accuracy' in round 0 \(did you mean 'client_accuracy'"
    with pytest.raises(tfr.ConfigError, match=message):
        await run_experiment(config(evaluate_every=2, **targets("clients_accuracy", 0.5)), tmp_path)
