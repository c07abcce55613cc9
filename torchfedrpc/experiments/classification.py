"""A learner that classifies."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from torchfedrpc.experiments.data.samples import Samples, TrainTest
from torchfedrpc.experiments.model import build_model, copy_weights, initial_weights
from torchfedrpc.experiments.recipe import build
from torchfedrpc.experiments.training import Optimisation, fit, score
from torchfedrpc.federation.learner_base import Learner
from torchfedrpc.host.context import current_call
from torchfedrpc.registry import learner

Recipe = Mapping[str, Any]


@learner("classification")
class ClassificationLearner(Learner):
    """Trains a classifier on the client's share of a dataset, by SGD.

    Dataset and model arrive as recipes and are made where the learner lives: the dataset once in a process,
    the model once for each call that runs at the same time. They may name what
    `build` allows. What a learner keeps of its own is its weights.

    Args:
        client_id: the client that this learner is.
        dataset: recipe of a `TrainTest`.
        indices: [num_samples], int64; the client's share of the training set.
        model: recipe of a module that maps inputs to logits.
        seed: draws the initial weights, the same for all clients that have the same seed.
        batch_size: samples in a step of SGD.
        learning_rate: of SGD.
        momentum: of SGD.
        weight_decay: of SGD.
    """

    def __init__(
        self,
        client_id: str,
        *,
        dataset: Recipe,
        indices: npt.NDArray[np.int64],
        model: Recipe,
        seed: int = 0,
        batch_size: int = 32,
        learning_rate: float = 0.1,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(client_id)
        self._dataset_recipe = dataset
        self._model_recipe = model
        self._seed = seed
        self._indices = torch.from_numpy(indices)
        self._optimisation = Optimisation(batch_size, learning_rate, momentum, weight_decay)
        self._weights: Mapping[str, Tensor] | None = None

    def train_epoch(
        self,
        model_weights: Mapping[str, Tensor] | None = None,
        round_num: int = 0,
        local_epochs: int = 1,
        learning_rate: float | None = None,
        proximal_mu: float = 0.0,
    ) -> dict[str, Any]:
        """Train for some epochs, and keep the outcome as the learner's own weights.

        Args:
            model_weights: a state dict to begin with. Default: the learner's own weights.
            round_num: the trainer's round; training does not depend on it.
            local_epochs: passes over the client's samples.
            learning_rate: in place of the learner's own.
            proximal_mu: FedProx's pull towards the weights that training begins with.

        Returns:
            ``model_weights`` (a state dict), ``num_samples``, and ``train_loss`` (mean cross-entropy).

        Raises:
            CancelledError: the caller no longer wants the result; the learner's own weights stay as they
                were.
        """
        call = current_call()
        optimisation = dataclasses.replace(self._optimisation, proximal_mu=proximal_mu)
        if learning_rate is not None:
            optimisation = dataclasses.replace(optimisation, learning_rate=learning_rate)
        with self._borrowed_model(model_weights) as model:
            train_loss = fit(
                model,
                self._train_set(),
                self._indices,
                num_epochs=local_epochs,
                optimisation=optimisation,
                is_cancelled=lambda: call.cancelled,
            )
            self._weights = copy_weights(model)
        return {
            "model_weights": self._weights,
            "num_samples": len(self._indices),
            "train_loss": train_loss,
        }

    def evaluate(self, model_weights: Mapping[str, Tensor] | None = None) -> dict[str, Any]:
        """Score a model on the client's own samples.

        Args:
            model_weights: a state dict. Default: the learner's own weights.

        Returns:
            ``accuracy`` (0 to 1), ``loss`` (mean cross-entropy) and ``num_samples``.
        """
        with self._borrowed_model(model_weights) as model:
            return dataclasses.asdict(score(model, self._train_set().take(self._indices)))

    def get_model_weights(self) -> Mapping[str, Tensor]:
        """The learner's own weights, a state dict: as last trained or set, at first the initial ones."""
        if self._weights is None:
            return self._shared_initial_weights()
        return self._weights

    def set_model_weights(self, weights: Mapping[str, Tensor]) -> None:
        """Take ``weights``, a state dict, as the learner's own."""
        self._weights = weights

    def state_dict(self) -> dict[str, Any]:
        """What training changes, for snapshots: the learner's own weights; all else the constructor makes anew."""
        return {"weights": self._weights}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` gave."""
        self._weights = state["weights"]

    def _train_set(self) -> Samples:
        call = current_call()

        def load() -> Samples:
            dataset: TrainTest = build(self._dataset_recipe, call.trusted_modules)
            return dataset.train.to(call.device)

        return call.shared(("train_set", _key(self._dataset_recipe), str(call.device)), load)

    def _shared_initial_weights(self) -> Mapping[str, Tensor]:
        key = ("initial_weights", _key(self._model_recipe), self._seed)
        call = current_call()
        return call.shared(key, lambda: initial_weights(self._model_recipe, self._seed, call.trusted_modules))

    @contextmanager
    def _borrowed_model(self, weights: Mapping[str, Tensor] | None) -> Iterator[nn.Module]:
        """Lend a module that holds ``weights`` (default: the learner's own), on the call's device.

        Building a module costs more than a step of training, and a thousand clients need no thousand
        modules: idle ones lie in a list, from which each call takes its own.
        """
        call = current_call()
        idle: list[nn.Module] = call.shared(("idle_models", _key(self._model_recipe), str(call.device)), list)
        try:
            model = idle.pop()
        except IndexError:
            model = build_model(self._model_recipe, self._seed, call.trusted_modules).to(call.device)
        try:
            model.load_state_dict(self.get_model_weights() if weights is None else weights)
            yield model
        finally:
            idle.append(model)


def _key(recipe: Recipe) -> str:
    return json.dumps(recipe, sort_keys=True)
