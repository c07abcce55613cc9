"""Models from recipes. Equal seeds give equal initial weights in every process."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from torchfedrpc.errors import ConfigError
from torchfedrpc.experiments.recipe import build


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
