"""Frame of a block that opens proxies for the learner `MyLearner`, which has state."""

from typing import Any

import torch

import torchfedrpc as tfr


class MyLearner:
    """Learner that keeps its weights."""

    def __init__(self, client_id: str) -> None:
        self.weights = torch.randn(3)

    def train_epoch(self, weights: torch.Tensor | None = None, local_epochs: int = 1) -> dict[str, Any]:
        """Return new weights."""
        self.weights = self.weights + torch.randn(3)
        return {"model_weights": self.weights, "num_samples": 3}


async def main() -> None:
    """Run the block."""
    # SNIPPET


if __name__ == "__main__":
    tfr.run(main)
