"""Federated averaging of a linear model over four clients, in 30 lines.

python quickstart.py                                 everything in this process
python quickstart.py pseudo                          learners in worker processes
torchrun --nproc-per-node=3 quickstart.py            learners on the launch's ranks 1 and 2
"""

import sys

import torch

import torchfedrpc as tfr


class LineLearner:
    """Learns y = a x + b from points of its own."""

    def __init__(self, client_id: str) -> None:
        self.x = torch.rand(64, 1)  # seeded by the run's seed and the client's id, wherever this runs
        self.y = 3 * self.x + 1 + 0.1 * torch.randn(64, 1)

    def train_epoch(self, weights: torch.Tensor, steps: int) -> torch.Tensor:
        """Take some steps of gradient descent from ``weights`` [a, b]."""
        weights = weights.requires_grad_()
        for _ in range(steps):
            loss = ((self.x * weights[0] + weights[1] - self.y) ** 2).mean()
            weights = (weights - 0.1 * torch.autograd.grad(loss, weights)[0]).detach().requires_grad_()
        return weights.detach()


async def main() -> None:
    """Ten rounds."""
    mode = sys.argv[1] if len(sys.argv) > 1 else "auto"
    async with tfr.LearnerProxy(LineLearner, runtime={"execution_mode": mode, "num_clients": 4}) as proxy:
        weights = torch.zeros(2)
        for _ in range(10):
            results = await proxy.clients().train_epoch(weights=weights, steps=20)
            weights = torch.stack(list(results.values())).mean(dim=0)
        print(f"{proxy.mode}: y = {weights[0]:.6f} x + {weights[1]:.6f}")


if __name__ == "__main__":
    tfr.run(main)
