"""Frame of a block that uses an open proxy."""

import sys
from collections.abc import Iterator
from typing import Any

import torch

import torchfedrpc as tfr


class MyLearner:
    """Learner with the methods that the documentation calls."""

    def __init__(self, client_id: str) -> None:
        self.weights = torch.zeros(2)

    def train_epoch(self, weights: Any = None, local_epochs: int = 1) -> dict[str, Any]:
        """Return new weights."""
        return {"model_weights": self.weights + local_epochs, "num_samples": 3}

    def evaluate(self) -> float:
        """Return a score."""
        return 0.5

    def distill(self, teacher: Any, alpha: float = 0.5) -> float:
        """Return a loss."""
        return float(alpha)

    def method(self) -> Iterator[int]:
        """Yield some numbers."""
        yield from range(3)


async def main() -> None:
    """Run the block."""
    async with tfr.LearnerProxy(MyLearner, runtime={"num_clients": 10, "num_processes": 2}) as proxy:
        cohort = proxy.client_ids
        teacher = w = weights = torch.ones(2)
        print(len(cohort), teacher, w, weights, file=sys.stderr)
        # SNIPPET


if __name__ == "__main__":
    tfr.run(main)
