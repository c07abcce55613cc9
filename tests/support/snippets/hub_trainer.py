"""Frame of a method that trains with `transformers.Trainer`."""

from tempfile import TemporaryDirectory  # noqa: F401, the block uses it

import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    Trainer,  # noqa: F401
    TrainingArguments,  # noqa: F401
)

import torchfedrpc as tfr


class Trained:
    def __init__(self, client_id: str) -> None:
        config = BertConfig(vocab_size=30, hidden_size=16, num_hidden_layers=1, num_attention_heads=2)
        self.model = BertForSequenceClassification(config)
        self.rows = [{"input_ids": torch.arange(1, 7), "labels": number % 2} for number in range(4)]

    # SNIPPET


async def main() -> None:
    runtime = {"num_clients": 2, "trusted_modules": ["transformers"]}
    async with tfr.LearnerProxy(Trained, runtime=runtime) as proxy:
        print(dict(await proxy.clients().train_epoch()))
        assert len([data async for _, data in proxy.snapshots()]) == 2


if __name__ == "__main__":
    tfr.run(main)
