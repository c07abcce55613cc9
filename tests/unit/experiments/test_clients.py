"""Scores of clients: whatever is a number is kept, and what is none is told."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

import torchfedrpc as tfr
from torchfedrpc.experiments.clients import ClientLog


class Scoring:
    """Each client has another kind of score."""

    def __init__(self, client_id: str) -> None:
        self.client_id = client_id

    def evaluate(self, model_weights: Any) -> Any:
        return {
            "tensors": {"accuracy": torch.tensor(0.5), "num_samples": 3},
            "arrays": {"accuracy": np.float32(0.25)},
            "plain": 0.75,
            "words": {"accuracy": "good"},
        }[self.client_id]


async def test_scores_are_numbers_of_any_kind_and_others_are_told(tmp_path: Path) -> None:
    parts = {client_id: np.arange(2) for client_id in ("tensors", "arrays", "plain", "words")}
    log = ClientLog(tmp_path / "clients.jsonl", parts, np.zeros(2, dtype=np.int64))
    async with tfr.LearnerProxy(Scoring, list(parts), runtime="local") as proxy:
        told = await log.score(proxy, {})
    assert told == "no score by words: evaluate returned {'accuracy': 'good'}, without a finite number"
    records = map(json.loads, (tmp_path / "clients.jsonl").read_text().splitlines())
    assert [record["scores"] for record in records] == [{"accuracy": 0.5}, {"accuracy": 0.25}, {"score": 0.75}, {}]
