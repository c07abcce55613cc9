"""Frame of a block about the learner `MyLearner`, and weights `first` and `second`."""

from typing import Any

import torch

import torchfedrpc as tfr


class MyLearner:
    """Stateless learner."""

    stateless = True

    def __init__(self, client_id: str) -> None:
        self.data = torch.arange(3.0)

    def train_epoch(self, weights: torch.Tensor | None = None, local_epochs: int = 1) -> dict[str, Any]:
        """Return new weights."""
        return {"model_weights": self.data if weights is None else weights + self.data, "num_samples": 3}


async def main() -> None:
    """Run the block."""
    first = second = torch.ones(3)
    print(first, second, tfr.__version__)
    # SNIPPET


if __name__ == "__main__":
    tfr.run(main)
