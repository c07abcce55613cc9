"""FedBuff against FedAvg on a virtual clock, where three of ten clients take eight times as long.

python fedbuff.py [MODE]        MODE is auto (the default), local or pseudo
torchrun --nproc-per-node=3 fedbuff.py
"""

import sys
from collections.abc import Mapping

import numpy as np
import torch

import torchfedrpc as tfr

DATASET = {"_target_": "torchfedrpc.experiments.data.synthetic.synthetic", "num_samples": 1000, "noise": 2.0}
MODEL = {"_target_": "torchfedrpc.experiments.models.MLP"}
DATA = tfr.build(DATASET)
TARGET = 0.9


def score(weights: Mapping[str, torch.Tensor]) -> dict[str, float]:
    """Score a model on the test set."""
    model = tfr.build(MODEL)
    model.load_state_dict(weights)
    with torch.inference_mode():
        return {"accuracy": float((model(DATA.test.inputs).argmax(dim=1) == DATA.test.labels).float().mean())}


async def train(trainer: type[tfr.FedAvgTrainer], **settings: int) -> None:
    """Train, and print the virtual time until the target accuracy."""
    mode = sys.argv[1] if len(sys.argv) > 1 else "auto"
    common = {"dataset": DATASET, "model": MODEL, "batch_size": 20, "learning_rate": 0.05}
    parts = np.array_split(np.random.default_rng(0).permutation(len(DATA.train)), 10)
    clients = {f"client_{number}": {**common, "indices": part} for number, part in enumerate(parts)}
    speeds = tfr.SimulatedClients(slow_fraction=0.3, slow_factor=8, spread=0.2, seed=5)
    async with tfr.LearnerProxy("classification", clients, runtime=mode) as proxy:
        torch.manual_seed(0)  # initial weights are drawn on the driver
        weights = tfr.build(MODEL).state_dict()
        history: list[tfr.RoundEnded] = []
        given = {"initial_weights": weights, "score": score, "simulation": speeds, "history": history}
        await trainer({"seed": 1, **settings}, proxy, **given).train()
        reached = [one.metrics for one in history if one.metrics["accuracy"] >= TARGET]
        print(f"{proxy.mode}: {trainer.__name__} reached {TARGET} after {reached[0]['simulated_seconds']:.1f} s")


async def main() -> None:
    """Compare the two."""
    await train(tfr.FedAvgTrainer, num_rounds=20, clients_per_round=5)
    await train(tfr.FedBuffTrainer, num_rounds=40, num_in_flight=5, buffer_size=3)


if __name__ == "__main__":
    tfr.run(main)
