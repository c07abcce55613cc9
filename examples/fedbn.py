"""FedBN against FedAvg under feature skew: each client's images have a brightness and a contrast of their own.

python fedbn.py [MODE]        MODE is auto (the default), local or pseudo
torchrun --nproc-per-node=3 fedbn.py
"""

import sys

import numpy as np

import torchfedrpc as tfr
from torchfedrpc.experiments.data.synthetic import synthetic
from torchfedrpc.experiments.training import build_model, copy_weights

NUM_CLIENTS = 6
DATASET = {"_target_": f"{__name__}.skewed"}
MODEL = {"_target_": "torchfedrpc.experiments.models.ConvNet", "channels": [4, 8], "batch_norm": True}


def skewed() -> tfr.TrainTest:
    """Images whose contrast and brightness depend on the client, which is their group."""
    data = synthetic(num_samples=1200, noise=1.0)

    def of_clients(samples: tfr.Samples) -> tfr.Samples:
        inputs = samples.inputs.clone()
        for client, share in enumerate(shares(len(samples))):
            inputs[share] = inputs[share] * 1.5 ** (client - 2) + 0.5 * (client - 2)
        return tfr.Samples(inputs, samples.labels)

    return tfr.TrainTest(of_clients(data.train), of_clients(data.test))


def shares(num_samples: int) -> list[np.ndarray]:
    """The indices of each client's samples."""
    return np.array_split(np.random.default_rng(0).permutation(num_samples), NUM_CLIENTS)


async def train(trainer: type[tfr.FedAvgTrainer], learner: str) -> None:
    """Train, and print the worst accuracy among the clients."""
    mode = sys.argv[1] if len(sys.argv) > 1 else "auto"
    runtime = {"execution_mode": mode, "trusted_modules": [__name__]}
    common = {"dataset": DATASET, "model": MODEL, "learning_rate": 0.03, "momentum": 0.9}
    parts = shares(len(skewed().train))
    clients = {f"client_{number}": {**common, "indices": part} for number, part in enumerate(parts)}
    async with tfr.LearnerProxy(learner, clients, runtime=runtime) as proxy:
        weights = copy_weights(build_model(MODEL, seed=0))
        final = await trainer({"num_rounds": 10, "local_epochs": 2}, proxy, initial_weights=weights).train()
        scores = await proxy.clients().evaluate(model_weights=final)
        worst = min(score["accuracy"] for score in scores.values())
        print(f"{proxy.mode}: {trainer.__name__}, accuracy of the worst client {worst:.3f}")


async def main() -> None:
    """Compare the two."""
    await train(tfr.FedAvgTrainer, "classification")
    await train(tfr.FedBNTrainer, "fedbn")


if __name__ == "__main__":
    tfr.run(main)
