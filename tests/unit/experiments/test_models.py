"""The bundled models, and building them from recipes."""

from __future__ import annotations

import pytest
import torch

from torchfedrpc.errors import ConfigError
from torchfedrpc.experiments.training import build_model, copy_weights, initial_weights

MODELS = ["ConvNet", "MLP", "LogisticRegression"]


@pytest.mark.parametrize("name", MODELS)
def test_a_model_maps_images_to_logits(name: str) -> None:
    model = build_model({"_target_": f"torchfedrpc.experiments.models.{name}"}, seed=0)
    assert model(torch.zeros(5, 1, 8, 8)).shape == (5, 10)


@pytest.mark.parametrize("name", MODELS)
def test_a_model_has_no_running_statistics(name: str) -> None:
    assert not list(build_model({"_target_": f"torchfedrpc.experiments.models.{name}"}, seed=0).buffers())


def test_sizes_can_be_chosen() -> None:
    conv_net = {"_target_": "torchfedrpc.experiments.models.ConvNet", "image_size": 28, "channels": [4, 6]}
    assert build_model(conv_net, seed=0)(torch.zeros(2, 1, 28, 28)).shape == (2, 10)
    mlp = {"_target_": "torchfedrpc.experiments.models.MLP", "num_inputs": 12, "hidden": [5, 4], "num_classes": 3}
    assert build_model(mlp, seed=0)(torch.zeros(2, 12)).shape == (2, 3)


def test_initial_weights_follow_the_seed_and_leave_the_random_stream_alone() -> None:
    recipe = {"_target_": "torchfedrpc.experiments.models.MLP"}
    torch.manual_seed(1)
    expected = torch.rand(1)
    torch.manual_seed(1)
    first = initial_weights(recipe, seed=4)
    assert torch.equal(torch.rand(1), expected)
    again, other = initial_weights(recipe, seed=4), initial_weights(recipe, seed=5)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["layers.0.weight"], other["layers.0.weight"])


def test_copied_weights_do_not_follow_the_model() -> None:
    model = torch.nn.Linear(1, 1)
    weights = copy_weights(model)
    with torch.no_grad():
        model.weight.add_(1)
    assert not torch.equal(weights["weight"], model.weight)
    assert not weights["weight"].requires_grad


def test_a_recipe_that_makes_no_module_is_refused() -> None:
    with pytest.raises(ConfigError, match="makes a Counter, not a torch"):
        build_model({"_target_": "collections.Counter"}, 0, ["collections"])
