"""Differential privacy of clients: changes are clipped, their sum has noise, and an accountant counts epsilon.

python private.py [MODE]        MODE is auto (the default), local or pseudo; pip install 'torchfedrpc[privacy]' before
torchrun --nproc-per-node=3 private.py
"""

import sys
from collections.abc import Mapping

import numpy as np
import torch

import torchfedrpc as tfr

DATASET = {"_target_": "torchfedrpc.experiments.data.synthetic.synthetic", "num_samples": 2500}
MODEL = {"_target_": "torchfedrpc.experiments.models.LogisticRegression"}
DATA = tfr.build(DATASET)
NUM_CLIENTS = 100


def score(weights: Mapping[str, torch.Tensor]) -> dict[str, float]:
    """Score a model on the test set."""
    model = tfr.build(MODEL)
    model.load_state_dict(weights)
    with torch.inference_mode():
        return {"accuracy": float((model(DATA.test.inputs).argmax(dim=1) == DATA.test.labels).float().mean())}


async def main() -> None:
    """Train with more and more noise."""
    mode = sys.argv[1] if len(sys.argv) > 1 else "auto"
    common = {"dataset": DATASET, "model": MODEL, "batch_size": 20, "learning_rate": 0.1, "keep_weights": False}
    parts = np.array_split(np.random.default_rng(0).permutation(len(DATA.train)), NUM_CLIENTS)
    clients = {f"client_{number}": {**common, "indices": part} for number, part in enumerate(parts)}
    for noise_multiplier in (0.5, 2.0, 8.0):
        history: list[tfr.RoundEnded] = []
        # The seed makes the noise the same in each mode; without one, seed=None, nobody can compute it.
        aggregator = tfr.GaussianMean(clip_norm=0.5, noise_multiplier=noise_multiplier, seed=1)
        async with tfr.LearnerProxy("classification", clients, runtime=mode) as proxy:
            settings = {"num_rounds": 6, "clients_per_round": 20}
            torch.manual_seed(0)  # initial weights are drawn on the driver
            given = {"initial_weights": tfr.build(MODEL).state_dict(), "score": score, "history": history}
            await tfr.FedAvgTrainer(settings, proxy, aggregator=aggregator, **given).train()
            last = history[-1].metrics
            print(
                f"{proxy.mode}: noise {noise_multiplier}: epsilon {last['epsilon']:.1f}, {last['accuracy']:.3f} right"
            )


if __name__ == "__main__":
    tfr.run(main)
