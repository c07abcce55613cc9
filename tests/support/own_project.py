"""A project with classes of all kinds that the command takes, and commands in its folder."""

from __future__ import annotations

import json
import subprocess
import textwrap
from pathlib import Path
from typing import Any

from processes import environment

METHODS = """
    import numpy as np
    import torch
    import torchfedrpc as tfr

    @tfr.trainer("my_trainer")
    class MyTrainer(tfr.FedAvgTrainer):
        settings = {"mu": 0.1}

        def local_settings(self):
            return {**super().local_settings(), "pull": self.config.mu}

    @tfr.learner("my_learner")
    class MyLearner:
        stateless = True

        def __init__(self, client_id, *, dataset, indices, model, learning_rate=0.05):
            self.samples = tfr.build(dataset).train.take(torch.from_numpy(indices))
            self.model = tfr.build(model)
            self.learning_rate = learning_rate

        def train_epoch(self, model_weights, round_num, local_epochs, pull=0.0):
            self.model.load_state_dict(model_weights)
            optimiser = torch.optim.SGD(self.model.parameters(), lr=self.learning_rate, weight_decay=pull)
            for _ in range(local_epochs):
                loss = torch.nn.functional.cross_entropy(self.model(self.samples.inputs), self.samples.labels)
                optimiser.zero_grad()
                loss.backward()
                optimiser.step()
            num_samples = len(self.samples)
            return {"model_weights": self.model.state_dict(), "num_samples": num_samples, "train_loss": loss.item()}

    @tfr.dataset("my_dataset")
    def my_dataset(num_samples=80, seed=0):
        generator = torch.Generator().manual_seed(seed)
        inputs = torch.randn(num_samples, 1, 8, 8, generator=generator)
        samples = tfr.Samples(inputs, torch.arange(num_samples) % 10)
        return tfr.TrainTest(samples, samples)

    @tfr.model("my_model")
    class MyModel(torch.nn.Sequential):
        def __init__(self, width=8):
            layers = torch.nn.Linear(64, width), torch.nn.ReLU(), torch.nn.Linear(width, 10)
            super().__init__(torch.nn.Flatten(), *layers)

    @tfr.partition("my_partition")
    def my_partition(labels, num_clients):
        return np.array_split(np.arange(len(labels)), num_clients)

    @tfr.cohort("my_cohort")
    async def my_cohort(trainer, round_num, clients, size, *, skip=0):
        return [client for number, client in enumerate(clients) if number != (round_num + skip) % len(clients)]

    @tfr.aggregator("my_aggregator")
    def my_aggregator(models, num_samples, *, quantile=0.5):
        stacked = {name: torch.stack([model[name] for model in models]) for name in models[0]}
        return {name: tensor.quantile(quantile, dim=0) for name, tensor in stacked.items()}
"""
"""Module that registers ``my_trainer``, ``my_learner`` and so on."""


def write(folder: Path, **files: str) -> None:
    """Write modules by name."""
    for name, text in files.items():
        (folder / f"{name}.py").write_text(textwrap.dedent(text).lstrip())


def shell(folder: Path, *command: str, timeout_s: float = 100) -> str:
    """Run a command in a folder; its output, which must be that of a success."""
    done = subprocess.run(
        command, cwd=folder, env=environment(), capture_output=True, text=True, timeout=timeout_s, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def history(outputs: Path) -> list[dict[str, Any]]:
    """The rounds of a run without times and traffic."""
    unlike = ("seconds", "bytes_sent", "bytes_received")
    rounds = [json.loads(line) for line in (outputs / "history.jsonl").read_text().splitlines()]
    return [{key: value for key, value in record.items() if key not in unlike} for record in rounds]
