"""Split learning: clients have the first layers and the data, the driver has the rest of the model and its optimiser.

Activations and their gradients travel between them, and no sample does (Gupta and Raskar 2018).

python split_learning.py [MODE]        MODE is auto (the default), local or pseudo
torchrun --nproc-per-node=3 split_learning.py
"""

import sys

import torch
from torch import Tensor, nn

import torchfedrpc as tfr


class LowerHalf:
    """The client's part: samples, the first layer, and its optimiser."""

    def __init__(self, client_id: str) -> None:
        self.x = 2 * torch.rand(200, 2) - 1
        self.y = (self.x.norm(dim=1) < 0.7).long()
        self.layer = nn.Sequential(nn.Linear(2, 16), nn.Tanh())
        self.optimiser = torch.optim.SGD(self.layer.parameters(), lr=0.5, momentum=0.9)

    def forward(self) -> tuple[Tensor, Tensor]:
        """Return activations [200, 16] and labels [200]."""
        with torch.inference_mode():
            return self.layer(self.x), self.y

    def backward(self, gradient: Tensor) -> None:
        """Take a step by the gradient of the loss by the activations, [200, 16]."""
        self.optimiser.zero_grad()
        self.layer(self.x).backward(gradient)
        self.optimiser.step()

    def get_layer(self) -> dict[str, Tensor]:
        """Return the first layer's weights."""
        return self.layer.state_dict()

    def set_layer(self, weights: dict[str, Tensor]) -> None:
        """Replace the first layer's weights."""
        self.layer.load_state_dict(weights)


async def main() -> None:
    """One client after another trains, and hands its layer on to the next."""
    mode = sys.argv[1] if len(sys.argv) > 1 else "auto"
    torch.manual_seed(0)
    head = nn.Linear(16, 2)
    optimiser = torch.optim.SGD(head.parameters(), lr=0.5, momentum=0.9)
    async with tfr.LearnerProxy(LowerHalf, ["a", "b", "c"], runtime=mode, seed=1) as proxy:
        layer = await proxy.client("a").get_layer()
        for _ in range(6):
            for client_id in proxy.client_ids:
                client = proxy.client(client_id)
                await client.set_layer(layer)
                for _ in range(10):
                    activations, labels = await client.forward()
                    activations.requires_grad_()
                    loss = nn.functional.cross_entropy(head(activations), labels)
                    optimiser.zero_grad()
                    loss.backward()
                    optimiser.step()
                    await client.backward(activations.grad)
                layer = await client.get_layer()
        right = [(head(x).argmax(dim=1) == y).float().mean() for x, y in (await proxy.clients().forward()).values()]
        print(f"{proxy.mode}: accuracy {float(sum(right)) / len(right):.4f}")


if __name__ == "__main__":
    tfr.run(main)
