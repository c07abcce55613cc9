"""Distillation between different models: clients exchange predictions on public inputs, no weights (Li, Wang 2019).

python distillation.py [MODE]        MODE is auto (the default), local or pseudo
torchrun --nproc-per-node=3 distillation.py
"""

import sys

import torch
from torch import Tensor, nn

import torchfedrpc as tfr

PUBLIC = torch.cartesian_prod(torch.linspace(-1, 1, 15), torch.linspace(-1, 1, 15))  # [225, 2], without labels


class Student:
    """A client with a model of its own size, and labels of its own half of the plane only."""

    def __init__(self, client_id: str, width: int, side: float) -> None:
        self.x = 2 * torch.rand(150, 2) - 1
        self.x[:, 0] = side * self.x[:, 0].abs()
        self.y = _labels(self.x)
        self.model = nn.Sequential(nn.Linear(2, width), nn.Tanh(), nn.Linear(width, 2))
        self.optimiser = torch.optim.Adam(self.model.parameters(), lr=0.02)

    def learn(self, consensus: Tensor | None) -> Tensor:
        """Train on the client's samples and towards the others' predictions; return logits on the public inputs."""
        for _ in range(40):
            loss = nn.functional.cross_entropy(self.model(self.x), self.y)
            if consensus is not None:
                predicted = self.model(PUBLIC).log_softmax(dim=1)
                loss = loss + nn.functional.kl_div(predicted, consensus.softmax(dim=1), reduction="batchmean")
            self.optimiser.zero_grad()
            loss.backward()
            self.optimiser.step()
        with torch.inference_mode():
            logits: Tensor = self.model(PUBLIC)
        return logits

    def accuracy(self) -> float:
        """Score the model on the whole plane."""
        with torch.inference_mode():
            return float((self.model(PUBLIC).argmax(dim=1) == _labels(PUBLIC)).float().mean())


def _labels(points: Tensor) -> Tensor:
    inside: Tensor = points.norm(dim=1) < 0.7
    return inside.long()


async def main() -> None:
    """Train alone, then with each other's predictions."""
    mode = sys.argv[1] if len(sys.argv) > 1 else "auto"
    clients = {
        f"client_{number}": {"width": 8 * (number + 1), "side": 1.0 if number % 2 else -1.0} for number in range(4)
    }
    async with tfr.LearnerProxy(Student, clients, runtime=mode, seed=1) as proxy:
        everyone = proxy.clients()
        consensus = None
        for round_num in range(8):
            logits = await everyone.learn(consensus)
            if round_num == 2:
                alone = (await everyone.accuracy()).values()
                print(f"{proxy.mode}: alone {sum(alone) / len(alone):.3f}")
            consensus = torch.stack(list(logits.values())).mean(dim=0) if round_num >= 2 else None
        together = (await everyone.accuracy()).values()
        print(f"{proxy.mode}: together {sum(together) / len(together):.3f}")


if __name__ == "__main__":
    tfr.run(main)
