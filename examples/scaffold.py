"""SCAFFOLD against FedAvg, where each client has two of ten classes and makes many local steps.

python scaffold.py [MODE]        MODE is auto (the default), local or pseudo
torchrun --nproc-per-node=3 scaffold.py
"""

import sys

import torch

import torchfedrpc as tfr
from torchfedrpc.experiments.data.partition import shards

DATASET = {"_target_": "torchfedrpc.experiments.data.synthetic.synthetic", "num_samples": 1000, "noise": 3.0}
MODEL = {"_target_": "torchfedrpc.experiments.models.LogisticRegression"}
DATA = tfr.build(DATASET)


def accuracy(weights: dict[str, torch.Tensor]) -> float:
    """Score a model on the test set."""
    model = tfr.build(MODEL)
    model.load_state_dict(weights)
    with torch.inference_mode():
        return float((model(DATA.test.inputs).argmax(dim=1) == DATA.test.labels).float().mean())


async def train(trainer: type[tfr.FedAvgTrainer], learner: str) -> None:
    """Train for ten rounds, and print the test accuracy."""
    mode = sys.argv[1] if len(sys.argv) > 1 else "auto"
    common = {"dataset": DATASET, "model": MODEL, "batch_size": 20, "learning_rate": 0.02}
    parts = shards(DATA.train.labels.numpy(), 10, shards_per_client=2)
    clients = {f"client_{number}": {**common, "indices": part} for number, part in enumerate(parts)}
    async with tfr.LearnerProxy(learner, clients, runtime=mode) as proxy:
        settings = {"num_rounds": 10, "clients_per_round": 5, "local_epochs": 10}
        torch.manual_seed(0)  # initial weights are drawn on the driver
        weights = await trainer(settings, proxy, initial_weights=tfr.build(MODEL).state_dict()).train()
        assert weights is not None
        print(f"{proxy.mode}: {trainer.__name__} {accuracy(dict(weights)):.3f}")


async def main() -> None:
    """Compare the two."""
    await train(tfr.FedAvgTrainer, "classification")
    await train(tfr.ScaffoldTrainer, "scaffold")


if __name__ == "__main__":
    tfr.run(main)
