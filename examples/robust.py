"""The mean, the median and multi-Krum, while two of ten clients send models that push in a wrong direction.

python robust.py [MODE]        MODE is auto (the default), local or pseudo
torchrun --nproc-per-node=3 robust.py
"""

import sys
from typing import Any

import numpy as np
import torch

import torchfedrpc as tfr

DATASET = {"_target_": "torchfedrpc.experiments.data.synthetic.synthetic", "num_samples": 1000}
MODEL = {"_target_": "torchfedrpc.experiments.models.LogisticRegression"}
DATA = tfr.build(DATASET)
ATTACKERS = ("client_3", "client_7")


class MaybeAttacker(tfr.ClassificationLearner):
    """Trains as usual; an attacker then returns a step in the opposite direction, ten times as long."""

    def train_epoch(self, model_weights: Any = None, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Train, or attack."""
        result = super().train_epoch(model_weights, *args, **kwargs)
        if self.client_id in ATTACKERS:
            trained = result["model_weights"]
            attack = {name: old - 10 * (trained[name] - old) for name, old in model_weights.items()}
            result["model_weights"] = attack
        return result


def accuracy(weights: Any) -> float:
    """Score a model on the test set."""
    model = tfr.build(MODEL)
    model.load_state_dict(weights)
    with torch.inference_mode():
        return float((model(DATA.test.inputs).argmax(dim=1) == DATA.test.labels).float().mean())


async def main() -> None:
    """Train with each aggregator."""
    mode = sys.argv[1] if len(sys.argv) > 1 else "auto"
    parts = np.array_split(np.random.default_rng(0).permutation(len(DATA.train)), 10)
    common = {"dataset": DATASET, "model": MODEL, "learning_rate": 0.02, "keep_weights": False}
    clients = {f"client_{number}": {**common, "indices": part} for number, part in enumerate(parts)}
    for aggregator in (None, tfr.CoordinateMedian(), tfr.TrimmedMean(0.2), tfr.MultiKrum(num_attackers=2)):
        async with tfr.LearnerProxy(MaybeAttacker, clients, runtime=mode) as proxy:
            torch.manual_seed(0)  # initial weights are drawn on the driver
            weights = tfr.build(MODEL).state_dict()
            trainer = tfr.FedAvgTrainer({"num_rounds": 5}, proxy, initial_weights=weights, aggregator=aggregator)
            name = "mean" if aggregator is None else type(aggregator).__name__
            print(f"{proxy.mode}: {name} {accuracy(await trainer.train()):.3f}")


if __name__ == "__main__":
    tfr.run(main)
