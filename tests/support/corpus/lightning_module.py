"""A LightningModule and how it is trained; imported by kinds that need Lightning."""

from __future__ import annotations

import logging
import warnings
from typing import Any

import lightning
import torch
from torch import Tensor, nn
from torch.utils import data


class Regression(lightning.LightningModule):
    """A linear model."""

    def __init__(self, lr: float = 0.05) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net = nn.Linear(4, 1)

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        """Return the loss of a batch."""
        x, y = batch
        loss = nn.functional.mse_loss(self.net(x), y)
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return a new optimiser."""
        return torch.optim.Adam(self.parameters(), self.hparams["lr"])


def fit(model: lightning.LightningModule, x: Tensor, y: Tensor) -> lightning.Trainer:
    """Train for an epoch, and return the trainer."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    quiet: dict[str, Any] = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of Lightning's, about few workers of the loader
        trainer = lightning.Trainer(max_epochs=1, accelerator="cpu", devices=1, **quiet)
        trainer.fit(model, data.DataLoader(data.TensorDataset(x, y), batch_size=4, shuffle=True))
    return trainer
