"""Workers that come and go, and a driver that may die: FedAvg over a dozen clients, saved after each round.

In the folder of this script, each in a terminal of its own:

    python -c 'import secrets; print(secrets.token_hex(32))' > token; chmod 600 token
    python elastic.py runs/spiral 127.0.0.1:29600                       # the driver
    torchfedrpc-worker --join 127.0.0.1:29600 --token-file token        # a worker, as many as you like

Ctrl-C sends a worker away, and its learners go to the others, as they do when it is killed (kill -9). The driver may
be killed too, and started again by the same command: it goes on behind the last round that was saved, with workers
that join anew. The last line is the same whatever happened, and that of a run without workers, into another folder:
python elastic.py runs/alone. A worker on another machine needs copies of token and script, and the driver's address.
"""

import argparse
import math

import torch
from torch import nn

import torchfedrpc as tfr


def make_model() -> nn.Module:
    """Two coordinates in, the scores of three arms out."""
    return nn.Sequential(nn.Linear(2, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 3))


class SpiralLearner:
    """Tells the three arms of a spiral apart; each client has points of one stretch of them."""

    def __init__(self, client_id: str, begin: float) -> None:
        turns = begin + 0.5 * torch.rand(256)
        self.labels = torch.randint(3, (256,))
        angles = 2 * math.pi * (turns + self.labels / 3)
        self.points = turns.unsqueeze(1) * torch.stack([angles.cos(), angles.sin()], dim=1)
        self.model = make_model()
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=0.005)  # goes wherever its learner goes

    def train_epoch(self, weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Take some steps from the weights given; returns the new ones."""
        self.model.load_state_dict(weights)
        for _ in range(10):
            self.optimizer.zero_grad()
            nn.functional.cross_entropy(self.model(self.points), self.labels).backward()
            self.optimizer.step()
        return self.model.state_dict()

    def evaluate(self, weights: dict[str, torch.Tensor]) -> float:
        """The loss of these weights on the client's own points."""
        self.model.load_state_dict(weights)
        with torch.inference_mode():
            return nn.functional.cross_entropy(self.model(self.points), self.labels).item()


class SpiralTrainer(tfr.AbstractFederationTrainer):
    """FedAvg. What later rounds need is in attributes and learners, which are saved, and not in local variables."""

    def __init__(self, config: dict[str, int], learner_proxy: tfr.LearnerProxy) -> None:
        super().__init__(config, learner_proxy)
        torch.manual_seed(1)
        self.weights = make_model().state_dict()
        self.loss = math.nan

    async def train(self) -> float:
        """Train, and return the last round's loss, the mean over all clients."""
        async for round_num in self.rounds():
            cohort = self.learner_proxy.clients(self.select_clients(round_num))
            updates = await cohort.train_epoch(self.weights)
            self.weights = await self.aggregate_weights(list(updates.values()))
            losses = await self.learner_proxy.clients().evaluate(self.weights)
            self.loss = sum(losses.values()) / len(losses)
            self.learner_proxy.publish(tfr.RoundEnded(round_num, self.num_rounds, {"loss": self.loss}))
        return self.loss


def show(event: tfr.Event) -> None:
    """Print what happens."""
    match event:
        case tfr.WorkerJoined():
            print(f"+ {event.worker} has joined", flush=True)
        case tfr.WorkerLeft():
            print(f"- {event.worker} has left", flush=True)
        case tfr.WorkerLost():
            print(f"- {event.worker} is lost: {event.reason}", flush=True)
        case tfr.RoundEnded():
            print(f"round {event.round_num}: loss {event.metrics['loss']:.3f}", flush=True)


async def main(folder: str, join_at: str | None, num_rounds: int) -> None:
    """Train with the workers that are there."""
    clients = {f"client_{number}": {"begin": number / 24} for number in range(12)}
    runtime = {"join_at": join_at, "token_file": "token", "rejoin_timeout_s": 600.0}
    async with tfr.LearnerProxy(SpiralLearner, clients, runtime=runtime, seed=1) as proxy:
        print(f"{proxy.mode} mode, workers: {', '.join(proxy.stats()['workers']) or 'none'}", flush=True)
        proxy.subscribe(show)
        trainer = SpiralTrainer({"num_rounds": num_rounds, "clients_per_round": 8}, proxy)
        trainer.checkpoints = tfr.Checkpoints(folder, resume="auto")
        print(f"loss after {num_rounds} rounds: {await trainer.train():.9f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Federated averaging with workers that come and go.")
    parser.add_argument("folder", help="where the run is saved, and goes on from")
    parser.add_argument("join_at", nargs="?", help="where workers join, HOST:PORT; without it there are none")
    parser.add_argument("--rounds", type=int, default=400, help="how many rounds a whole run has")
    options = parser.parse_args()
    tfr.run(main, options.folder, options.join_at, options.rounds)
