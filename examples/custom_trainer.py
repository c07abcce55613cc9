"""A learner and a trainer of one's own: FedAvg by hand, progress reports, and a stream.

python custom_trainer.py [MODE]        MODE is auto (the default), local or pseudo
torchrun --nproc-per-node=3 custom_trainer.py
"""

import sys
from collections.abc import Iterator

import torch
from torch import nn

import torchfedrpc as tfr


@tfr.learner("rings")
class RingLearner(tfr.Learner):
    """Tells points inside a ring from points outside; each client sees a ring of its own radius."""

    def __init__(self, client_id: str, radius: float) -> None:
        self.points = 2 * torch.rand(256, 2) - 1
        self.labels = (self.points.norm(dim=1) < radius).long()
        self.model = nn.Sequential(nn.Linear(2, 16), nn.Tanh(), nn.Linear(16, 2))

    def train_epoch(self, model_weights: dict[str, torch.Tensor], local_epochs: int = 1) -> dict[str, object]:
        """Train from the weights given; returns the new ones, and how many samples they come from."""
        self.model.load_state_dict(model_weights)
        optimizer = torch.optim.Adam(self.model.parameters(), lr=0.02)
        for epoch in range(local_epochs):
            loss = nn.functional.cross_entropy(self.model(self.points), self.labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            tfr.current_call().report({"epoch": epoch, "loss": loss.item()})
        return {"model_weights": self.model.state_dict(), "num_samples": len(self.points)}

    def evaluate(self) -> dict[str, float]:
        """Accuracy on the client's own points."""
        with torch.inference_mode():
            accuracy = (self.model(self.points).argmax(dim=1) == self.labels).float().mean()
        return {"accuracy": accuracy.item()}

    def get_model_weights(self) -> dict[str, torch.Tensor]:
        """The model's weights."""
        return self.model.state_dict()

    def set_model_weights(self, weights: dict[str, torch.Tensor]) -> None:
        """Replace the model's weights."""
        self.model.load_state_dict(weights)

    def worst_points(self, count: int) -> Iterator[list[float]]:
        """Yield the points on which the model is least sure, one for each that is asked for."""
        with torch.inference_mode():
            margin = self.model(self.points).diff(dim=1).abs().flatten()
        for index in margin.argsort()[:count]:
            yield self.points[index].tolist()


@tfr.trainer("ring_trainer")
class RingTrainer(tfr.AbstractFederationTrainer):
    """FedAvg by hand, with any of the learner's methods at hand."""

    async def train(self) -> float:
        """Train, and return the mean accuracy over the clients."""
        weights = await self.learner_proxy.get_model_weights(self.learner_proxy.client_ids[0])
        async for round_num in self.rounds():
            cohort = self.learner_proxy.clients(self.select_clients(round_num))
            results = await cohort.train_epoch(model_weights=weights, local_epochs=20)
            weights = await self.aggregate_weights(
                [result["model_weights"] for result in results.values()],
                num_samples=[result["num_samples"] for result in results.values()],
            )
        everyone = self.learner_proxy.clients()
        await everyone.set_model_weights(weights)
        scores = await everyone.evaluate()
        accuracies: list[float] = [score["accuracy"] for score in scores.values()]
        return sum(accuracies) / len(accuracies)


async def main() -> None:
    """Train the clients' rings together."""
    mode = sys.argv[1] if len(sys.argv) > 1 else "auto"
    clients = {f"ring_{number}": {"radius": 0.5 + 0.05 * number} for number in range(1, 7)}
    async with tfr.LearnerProxy("rings", clients, runtime=mode, seed=1) as proxy:
        trainer = tfr.get_trainer("ring_trainer")({"num_rounds": 20, "clients_per_round": 4, "seed": 1}, proxy)
        accuracy = await trainer.train()
        print(f"{proxy.mode}: mean accuracy {accuracy:.4f}")
        async for point in proxy.stream("ring_1", "worst_points", count=3):
            print(f"ring_1 is least sure at ({point[0]:.3f}, {point[1]:.3f})")


if __name__ == "__main__":
    tfr.run(main)
