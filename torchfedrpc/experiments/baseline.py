"""Centralised baseline: one model trained on the data of all clients, and its scores in ``baseline.jsonl``."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from torchfedrpc.experiments.data.samples import TrainTest
from torchfedrpc.experiments.training import LocalTraining, Score, build_model, fit, score
from torchfedrpc.private_files import replaced

BASELINE_FILE = "baseline.jsonl"


def train_centrally(
    *,
    model: Mapping[str, Any],
    data: TrainTest,
    seed: int,
    num_rounds: int,
    local_epochs: int = 1,
    trusted_modules: Iterable[str] = (),
    **settings: Any,
) -> list[Score]:
    """Train one model on the whole training set, from the initial weights of the federated run.

    Args:
        model: Recipe of the model.
        data: Training set, and test set for the scores.
        seed: Seed of the initial weights and the order of samples; the global random stream is preserved.
        num_rounds: Number of scores.
        local_epochs: Number of passes over the training set before each score, as many as a client makes in a round.
        trusted_modules: Packages that the recipe may name, as in `build`.
        settings: Fields of `LocalTraining`.

    Returns:
        The test score after each round's amount of training.
    """
    network = build_model(model, seed, trusted_modules)
    indices = torch.arange(len(data.train))
    scores = []
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        for _ in range(num_rounds):
            fit(
                network,
                data.train,
                indices,
                num_epochs=local_epochs,
                training=LocalTraining(**settings),
                trusted_modules=trusted_modules,
            )
            scores.append(score(network, data.test))
    return scores


def write_baseline(path: Path, scores: Sequence[Score]) -> None:
    """Write a line of JSON per score: ``round`` (from 0), ``test_accuracy`` and ``test_loss``."""
    with replaced(path) as file:
        for number, result in enumerate(scores):
            loss = result.loss if math.isfinite(result.loss) else None
            line = {"round": number, "test_accuracy": result.accuracy, "test_loss": loss}
            file.write(json.dumps(line).encode() + b"\n")
