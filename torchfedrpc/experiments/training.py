"""Models from recipes, and local training and scoring of a classifier, as functions of a model and its samples."""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import CancelledError
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from torchfedrpc.errors import ConfigError
from torchfedrpc.experiments.data.samples import Samples
from torchfedrpc.experiments.recipe import build

_SCORE_BATCH_SIZE = 1024
"""Bounds the memory for activations during scoring."""

Hook = Callable[[Sequence[nn.Parameter]], None]
"""Function that changes the gradients of a model's trained parameters in place, before each step."""


@dataclass(frozen=True)
class LocalTraining:
    """Settings of training on mini-batches.

    Attributes:
        batch_size: Number of samples in a step; the last step of an epoch may have fewer.
        learning_rate: Learning rate.
        momentum: Momentum of SGD. It starts at zero in each call, since clients keep no optimiser state between
            calls.
        weight_decay: Coefficient of L2 regularisation.
        optimiser: Recipe of another optimiser than SGD, such as ``{_target_: torch.optim.AdamW}``; it receives
            ``lr``, and ``weight_decay`` unless that is 0 here, so that its own default counts.
        schedule: Recipe of a ``torch.optim.lr_scheduler``, stepped after each step of the optimiser.
        loss: Recipe of a loss of logits and labels, averaged over the batch. Default: Cross-entropy.
        max_gradient_norm: Norm to which the gradient of each step is clipped.
        autocast: Whether forward passes run in bfloat16, by `torch.autocast`.
    """

    batch_size: int = 32
    learning_rate: float = 0.1
    momentum: float = 0.0
    weight_decay: float = 0.0
    optimiser: Mapping[str, Any] | None = None
    schedule: Mapping[str, Any] | None = None
    loss: Mapping[str, Any] | None = None
    max_gradient_norm: float | None = None
    autocast: bool = False

    def __post_init__(self) -> None:
        for name, least, below, expected in (
            ("batch_size", 1, math.inf, "a whole number of at least 1"),
            ("learning_rate", 0, math.inf, "a number of at least 0"),
            ("momentum", 0, 1, "a number of at least 0 and below 1"),
            ("weight_decay", 0, math.inf, "a number of at least 0"),
            ("max_gradient_norm", 0, math.inf, "a number above 0, or null"),
        ):
            value = getattr(self, name)
            if name == "max_gradient_norm" and value in (None, math.inf):
                continue
            kind = numbers.Integral if name == "batch_size" else numbers.Real
            is_number = isinstance(value, kind) and not isinstance(value, bool)
            if not is_number or not least <= value < below or (value == 0 and name == "max_gradient_norm"):
                raise ConfigError(f"learner.{name} is {expected}, not {value!r:.200}")
        given = self.optimiser or {}
        if "lr" in given or ("weight_decay" in given and self.weight_decay):
            name, own = ("lr", "learning_rate") if "lr" in given else ("weight_decay", "weight_decay")
            raise ConfigError(
                f"learner.optimiser has {name}={given[name]!r}, and learner.{own} is {getattr(self, own):g}: set "
                f"learner.{own} alone"
            )
        if self.optimiser is not None and self.momentum:
            raise ConfigError(
                f"learner.momentum={self.momentum:g} is of SGD, and learner.optimiser is {self.optimiser!r:.200}: "
                f"set learner.momentum=0, and what the optimiser has instead in its own recipe"
            )

    def make_optimiser(self, parameters: Sequence[nn.Parameter], trusted_modules: Iterable[str]) -> Any:
        """Return the optimiser."""
        if self.optimiser is None:
            return torch.optim.SGD(
                parameters, lr=self.learning_rate, momentum=self.momentum, weight_decay=self.weight_decay
            )
        decay = {"weight_decay": self.weight_decay} if self.weight_decay else {}
        return build(self.optimiser, trusted_modules, params=parameters, lr=self.learning_rate, **decay)

    def gradient_weight(self, num_steps: int) -> float:
        """Return by how much the gradients of some steps of SGD count in the change of the weights, over all steps.

        It is the norm ``||a_i||_1`` of Wang et al. 2020, section 4: the number of steps without momentum, and more
        with.

        Raises:
            ConfigError: If another optimiser, or a schedule, weighs gradients in another way.
        """
        if self.optimiser is not None or self.schedule is not None:
            raise ConfigError(
                "FedNova normalises the changes of SGD: set learner.optimiser and learner.schedule to null"
            )
        keep = 1 - self.momentum
        return (num_steps - self.momentum * (1 - self.momentum**num_steps) / keep) / keep


@dataclass(frozen=True)
class Fitted:
    """What `fit` did.

    Attributes:
        loss: Mean loss over all samples of all epochs, each computed before its step.
        num_steps: Number of steps of the optimiser.
    """

    loss: float
    num_steps: int


def fit(
    model: nn.Module,
    samples: Samples,
    indices: Tensor,
    *,
    num_epochs: int = 1,
    num_steps: int | None = None,
    training: LocalTraining,
    hooks: Sequence[Hook] = (),
    is_cancelled: Callable[[], bool] = lambda: False,
    trusted_modules: Iterable[str] = (),
) -> Fitted:
    """Train a classifier in place, with the order of samples drawn from torch's global random stream.

    Args:
        model: Maps inputs to logits [batch, num_classes].
        samples: The samples, on the model's device.
        indices: Indices of the samples to train on, int64, on the CPU or on that device.
        num_epochs: Number of passes over them.
        num_steps: Number of steps instead, over as many passes as it takes.
        training: Settings.
        hooks: Called with the trained parameters before each step, in order, and before gradients are clipped.
        is_cancelled: Called before each step; a true result cancels the training.
        trusted_modules: Packages that the recipes of optimiser, schedule and loss may name, as in `build`.

    Raises:
        CancelledError: If ``is_cancelled`` returned true.
        ConfigError: If a recipe is invalid.
    """
    model.train()
    parameters = trained_parameters(model)
    optimiser = training.make_optimiser(parameters, trusted_modules)
    schedule = build(training.schedule, trusted_modules, optimizer=optimiser) if training.schedule else None
    loss_of = build(training.loss, trusted_modules) if training.loss else nn.CrossEntropyLoss()
    total_loss = torch.zeros((), device=samples.labels.device)
    num_seen = num_done = 0
    autocast = torch.autocast(samples.inputs.device.type, dtype=torch.bfloat16, enabled=training.autocast)
    for inputs, labels in _batches(samples, indices, training.batch_size, num_epochs, num_steps):
        if is_cancelled():
            raise CancelledError
        with autocast:
            loss = loss_of(model(inputs), labels)
        optimiser.zero_grad()
        loss.backward()
        for hook in hooks:
            hook(parameters)
        if training.max_gradient_norm is not None:
            nn.utils.clip_grad_norm_(parameters, training.max_gradient_norm)
        optimiser.step()
        if schedule is not None:
            schedule.step()
        total_loss.add_(loss.detach(), alpha=len(labels))
        num_seen += len(labels)
        num_done += 1
    return Fitted(total_loss.item() / max(1, num_seen), num_done)


def _batches(
    samples: Samples, indices: Tensor, batch_size: int, num_epochs: int, num_steps: int | None
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the batches of some epochs, or as many as there are steps."""

    def epochs() -> Iterator[tuple[Tensor, Tensor]]:
        epoch = 0
        while len(indices) and (num_steps is not None or epoch < num_epochs):
            # One gather per epoch instead of one per step; drawn on the CPU, so that all devices use the same order.
            # A full batch stays in its own order, and has the bits of centralised training.
            is_full = len(indices) <= batch_size
            order = indices if is_full else indices[torch.randperm(len(indices)).to(indices.device)]
            yield from samples.take(order).batches(batch_size)
            epoch += 1

    return islice(epochs(), num_steps)


def trained_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Return the parameters of a model that training changes."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def trained_names(model: nn.Module) -> list[str]:
    """Return the names of these parameters in the state dict, which has shared ones several times."""
    named = model.named_parameters(remove_duplicate=False)
    return [name for name, parameter in named if parameter.requires_grad]


def trained_weights(model: nn.Module) -> dict[str, Tensor]:
    """Return copies of these parameters by name, each one once."""
    return {
        name: parameter.detach().clone() for name, parameter in model.named_parameters() if parameter.requires_grad
    }


def proximal(parameters: Sequence[Tensor], mu: float) -> Hook:
    """Return the hook of FedProx's term ``mu / 2 * ||w - w_global||^2``, relative to the present values."""
    anchors = [parameter.detach().clone() for parameter in parameters]

    def add_gradient(now: Sequence[nn.Parameter]) -> None:
        for parameter, anchor in zip(now, anchors, strict=True):
            if parameter.grad is not None:
                parameter.grad.add_(parameter.detach() - anchor, alpha=mu)

    return add_gradient


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
