"""Models from recipes: the same initial weights for the same seed, wherever they are built."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from torchfedrpc.errors import ConfigError
from torchfedrpc.experiments.recipe import build


def build_model(recipe: Mapping[str, Any], seed: int, trusted_modules: Iterable[str] = ()) -> nn.Module:
    """Build a model whose initial weights follow from ``seed``; the caller's random stream is left as it was.

    Args:
        recipe: of the model.
        seed: draws the weights.
        trusted_modules: packages that the recipe may name, as `build` has it.

    Raises:
        ConfigError: the recipe cannot be used, or does not make a module.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        model = build(recipe, trusted_modules)
    if not isinstance(model, nn.Module):
        raise ConfigError(f"{recipe['_target_']} makes a {type(model).__name__}, not a torch.nn.Module")
    return model


def copy_weights(model: nn.Module) -> dict[str, Tensor]:
    """The model's state dict as values of its own, which later training leaves alone."""
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def initial_weights(recipe: Mapping[str, Any], seed: int, trusted_modules: Iterable[str] = ()) -> dict[str, Tensor]:
    """The weights that `build_model`, with these arguments, begins with.

    Raises:
        ConfigError: as there.
    """
    return copy_weights(build_model(recipe, seed, trusted_modules))
