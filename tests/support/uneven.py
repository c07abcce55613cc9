"""A learner whose results may not go together with others', and a reducer that refuses them."""

from __future__ import annotations

import time
from typing import Any

import torch


class Uneven:
    """Draws as it trains, and returns weights of its client's shape."""

    def __init__(self, client_id: str, size: int = 2, seconds: float = 0.0) -> None:
        self.size = size
        self.seconds = seconds
        self.drawn: list[float] = []

    def train(self) -> Any:
        time.sleep(self.seconds)
        self.drawn.append(float(torch.rand(1)))
        return {"model_weights": {"weight": torch.ones(self.size)}, "num_samples": 1}

    def history(self) -> list[float]:
        return self.drawn


class Choosy:
    """Takes two results and merges no third."""

    def __init__(self) -> None:
        self.count = 0

    def add(self, result: Any) -> None:
        self.count += 1

    def merge(self, other: Choosy) -> None:
        self.count += other.count
        if self.count > 2:
            raise ValueError("enough")

    def finish(self) -> int:
        return self.count


class Picky(Choosy):
    """Takes no result of size 3."""

    def add(self, result: Any) -> None:
        if len(result["model_weights"]["weight"]) == 3:
            raise ValueError("too large")
        self.count = 1

    def merge(self, other: Choosy) -> None:
        self.count += other.count
