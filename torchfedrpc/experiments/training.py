"""Models from recipes, and local training and scoring of a classifier, as functions of a model and its samples."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import CancelledError
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchfedrpc.errors import ConfigError
from torchfedrpc.experiments.data.samples import Samples
from torchfedrpc.experiments.recipe import build

_SCORE_BATCH_SIZE = 1024
"""Bounds the memory for activations during scoring."""


@dataclass(frozen=True)
class Optimisation:
    """Settings of SGD on mini-batches.

    Attributes:
        batch_size: Number of samples in a step; the last step of an epoch may have fewer.
        learning_rate: Learning rate.
        momentum: Momentum. It starts at zero in each call, since clients keep no optimiser state between calls.
        weight_decay: Coefficient of L2 regularisation.
        proximal_mu: Coefficient of the proximal term, relative to the initial weights (FedProx, Li et al. 2020).
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
    """Train a classifier in place, with the order of samples drawn from torch's global random stream.

    Args:
        model: Maps inputs to logits [batch, num_classes].
        samples: The samples, on the model's device.
        indices: Indices of the samples to train on, int64, on the CPU or on that device.
        num_epochs: Number of passes over them.
        optimisation: Settings of SGD.
        is_cancelled: Called before each step; a true result cancels the training.

    Returns:
        The mean cross-entropy over all samples of all epochs, each computed before its step.

    Raises:
        CancelledError: If ``is_cancelled`` returned true.
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
        # One gather per epoch instead of one per step; drawn on the CPU, so that all devices use the same order.
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
    """Return FedProx's ``mu / 2 * ||w - w_global||^2``; 0 without anchors."""
    squares = [(now - anchor).square().sum() for now, anchor in zip(parameters, anchors, strict=bool(anchors))]
    return mu / 2 * torch.stack(squares).sum() if squares else 0.0


@dataclass(frozen=True)
class Score:
    """Score of a classifier on some samples.

    Attributes:
        accuracy: Fraction of correctly classified samples, 0 to 1.
        loss: Mean cross-entropy.
        num_samples: Number of samples.
    """

    accuracy: float
    loss: float
    num_samples: int


@torch.inference_mode()
def score(model: nn.Module, samples: Samples) -> Score:
    """Score a classifier in evaluation mode; the samples must be on its device."""
    model.eval()
    num_correct = num_seen = 0
    loss = 0.0
    for inputs, labels in samples.batches(_SCORE_BATCH_SIZE):
        logits = model(inputs)
        loss += F.cross_entropy(logits, labels, reduction="sum").item()
        num_correct += int((logits.argmax(dim=1) == labels).sum())
        num_seen += len(labels)
    return Score(num_correct / max(1, num_seen), loss / max(1, num_seen), num_seen)


def build_model(recipe: Mapping[str, Any], seed: int, trusted_modules: Iterable[str] = ()) -> nn.Module:
    """Build a model with initial weights drawn from ``seed``; the global random stream is preserved.

    Args:
        recipe: Recipe of the model.
        seed: Seed of the weights.
        trusted_modules: Packages that the recipe may name, as in `build`.

    Raises:
        ConfigError: If the recipe is invalid, or does not create a module.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        model = build(recipe, trusted_modules)
    if not isinstance(model, nn.Module):
        raise ConfigError(f"{recipe['_target_']} makes a {type(model).__name__}, not a torch.nn.Module")
    return model


def copy_weights(model: nn.Module) -> dict[str, Tensor]:
    """Return a copy of the model's state dict, which later training does not change."""
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def initial_weights(recipe: Mapping[str, Any], seed: int, trusted_modules: Iterable[str] = ()) -> dict[str, Tensor]:
    """Return the initial weights of a model that `build_model` builds with these arguments.

    Raises:
        ConfigError: As in `build_model`.
    """
    return copy_weights(build_model(recipe, seed, trusted_modules))
