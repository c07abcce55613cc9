"""Local training and scoring of a classifier: plain functions of a model and its samples."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchfedrpc.experiments.data.samples import Samples

_SCORE_BATCH_SIZE = 1024
"""Bounds the memory that activations take while a model is scored."""


@dataclass(frozen=True)
class Optimisation:
    """How a model is trained: by SGD on mini-batches.

    Attributes:
        batch_size: samples in a step; the last step of an epoch may have fewer.
        learning_rate: the length of a step.
        momentum: what remains of the last step. Clients have no state between calls, so it begins at zero in each.
        weight_decay: strength of the pull towards zero.
        proximal_mu: strength of the pull towards the weights that training began with (FedProx, Li et al. 2020).
    """

    batch_size: int = 32
    learning_rate: float = 0.1
    momentum: float = 0.0
    weight_decay: float = 0.0
    proximal_mu: float = 0.0


def fit(
    model: nn.Module,
    samples: Samples,
    indices: Tensor,
    *,
    num_epochs: int,
    optimisation: Optimisation,
    is_cancelled: Callable[[], bool] = lambda: False,
) -> float:
    """Train a classifier in place, in an order drawn from torch's global random stream.

    Args:
        model: maps inputs to logits [batch, num_classes].
        samples: on the model's device.
        indices: which of the samples to train on, int64, on the CPU or on that device.
        num_epochs: passes over them.
        optimisation: how.
        is_cancelled: asked before each step.

    Returns:
        The mean cross-entropy over all samples of all epochs, each taken before its step.

    Raises:
        CancelledError: ``is_cancelled`` said so.
    """
    model.train()
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    anchors = [parameter.detach().clone() for parameter in parameters] if optimisation.proximal_mu else []
    optimiser = torch.optim.SGD(
        parameters,
        lr=optimisation.learning_rate,
        momentum=optimisation.momentum,
        weight_decay=optimisation.weight_decay,
    )
    total_loss = torch.zeros((), device=samples.labels.device)
    for _ in range(num_epochs):
        # One gather an epoch in place of one a step; drawn on the CPU, so that all devices see the same order.
        epoch = samples.take(indices[torch.randperm(len(indices)).to(indices.device)])
        for inputs, labels in epoch.batches(optimisation.batch_size):
            if is_cancelled():
                raise CancelledError
            loss = F.cross_entropy(model(inputs), labels)
            optimiser.zero_grad()
            objective = loss + _proximal_term(parameters, anchors, optimisation.proximal_mu)
            objective.backward()
            optimiser.step()
            total_loss.add_(loss.detach(), alpha=len(labels))
    return total_loss.item() / max(1, num_epochs * len(indices))


def _proximal_term(parameters: Sequence[Tensor], anchors: Sequence[Tensor], mu: float) -> Tensor | float:
    """FedProx's ``mu / 2 * ||w - w_global||^2``; 0 where there are no anchors."""
    squares = [(now - anchor).square().sum() for now, anchor in zip(parameters, anchors, strict=bool(anchors))]
    return mu / 2 * torch.stack(squares).sum() if squares else 0.0


@dataclass(frozen=True)
class Score:
    """How well a classifier does on some samples.

    Attributes:
        accuracy: the share of them that it gets right, 0 to 1.
        loss: their mean cross-entropy.
        num_samples: how many they are.
    """

    accuracy: float
    loss: float
    num_samples: int


@torch.inference_mode()
def score(model: nn.Module, samples: Samples) -> Score:
    """Score a classifier in evaluation mode; the samples are on its device."""
    model.eval()
    num_correct = num_seen = 0
    loss = 0.0
    for inputs, labels in samples.batches(_SCORE_BATCH_SIZE):
        logits = model(inputs)
        loss += F.cross_entropy(logits, labels, reduction="sum").item()
        num_correct += int((logits.argmax(dim=1) == labels).sum())
        num_seen += len(labels)
    return Score(num_correct / max(1, num_seen), loss / max(1, num_seen), num_seen)
