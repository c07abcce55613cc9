"""Learner for classification."""

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

from torchfedrpc.errors import ConfigError
from torchfedrpc.experiments.data.cache import load_dataset
from torchfedrpc.experiments.data.samples import Samples, TrainTest
from torchfedrpc.experiments.training import Optimisation, build_model, copy_weights, fit, initial_weights, score
from torchfedrpc.federation.learner_base import Learner
from torchfedrpc.host.context import current_call
from torchfedrpc.registry import learner

Recipe = Mapping[str, Any]


@learner("classification")
class ClassificationLearner(Learner):
    """Learner that trains a classifier on the client's share of a dataset, by SGD.

    Dataset and model are given as recipes and built on the learner's worker: the dataset once per process, the model
    once per concurrent call. `build` defines what recipes may name. A learner's only state is its weights, which it
    keeps with ``keep_weights``. Without, it is stateless, and calls have the weights they need as arguments.

    Args:
        client_id: The client of this learner.
        dataset: Recipe of a `TrainTest`.
        indices: [num_samples], int64; the client's share of the training set.
        model: Recipe of a module that maps inputs to logits.
        seed: Seed of the initial weights, which are equal for all clients with the same seed.
        batch_size: Number of samples in a step of SGD.
        learning_rate: Learning rate of SGD.
        momentum: Momentum of SGD.
        weight_decay: Weight decay of SGD.
        keep_weights: Whether the learner has the weights of its last training, or of `set_model_weights`, in its next
            call. An experiment with False declares its learners stateless.
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
        keep_weights: bool = True,
    ) -> None:
        super().__init__(client_id)
        self._dataset_recipe = dataset
        self._model_recipe = model
        self._seed = seed
        self._indices = torch.from_numpy(indices)
        self._optimisation = Optimisation(batch_size, learning_rate, momentum, weight_decay)
        if not isinstance(keep_weights, bool):
            raise ConfigError(f"keep_weights is True or False, not {keep_weights!r:.200}")
        self._keeps_weights = keep_weights
        self._weights: Mapping[str, Tensor] | None = None

    def train_epoch(
        self,
        model_weights: Mapping[str, Tensor] | None = None,
        round_num: int = 0,
        local_epochs: int = 1,
        learning_rate: float | None = None,
        proximal_mu: float = 0.0,
    ) -> dict[str, Any]:
        """Train for some epochs, and keep the result as the learner's weights with ``keep_weights``.

        Args:
            model_weights: Initial weights, a state dict. Default: The learner's weights.
            round_num: The trainer's round; training does not depend on it.
            local_epochs: Number of passes over the client's samples.
            learning_rate: Learning rate of SGD. Default: The learner's learning rate.
            proximal_mu: Coefficient of FedProx's proximal term, relative to the initial weights.

        Returns:
            ``model_weights`` (a state dict), ``num_samples``, and ``train_loss`` (mean cross-entropy).

        Raises:
            CancelledError: If the call was cancelled; the learner's weights are unchanged.
            ConfigError: If no weights are given, and the learner keeps none.
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
            weights = copy_weights(model)
        if self._keeps_weights:
            self._weights = weights
        return {
            "model_weights": weights,
            "num_samples": len(self._indices),
            "train_loss": train_loss,
        }

    def evaluate(self, model_weights: Mapping[str, Tensor] | None = None) -> dict[str, Any]:
        """Score a model on the client's samples.

        Args:
            model_weights: A state dict. Default: The learner's weights.

        Returns:
            ``accuracy`` (0 to 1), ``loss`` (mean cross-entropy) and ``num_samples``.

        Raises:
            ConfigError: If no weights are given, and the learner keeps none.
        """
        with self._borrowed_model(model_weights) as model:
            return dataclasses.asdict(score(model, self._train_set().take(self._indices)))

    def get_model_weights(self) -> Mapping[str, Tensor]:
        """Return the learner's weights, a state dict: as last trained or set, else the initial weights.

        Raises:
            ConfigError: If the learner keeps no weights.
        """
        self._check_keeps_weights()
        if self._weights is None:
            return self._shared_initial_weights()
        return self._weights

    def set_model_weights(self, weights: Mapping[str, Tensor]) -> None:
        """Set the learner's weights to ``weights``, a state dict.

        Raises:
            ConfigError: If the learner keeps no weights.
        """
        self._check_keeps_weights()
        self._weights = weights

    def _check_keeps_weights(self) -> None:
        if not self._keeps_weights:
            raise ConfigError(
                f"the learner of {self.client_id} keeps no weights from call to call: give them with each call, as "
                f"train_epoch(model_weights=...) and evaluate(model_weights=...), or set learner.keep_weights=true"
            )

    def state_dict(self) -> dict[str, Any]:
        """Return the state for snapshots: the learner's weights. The constructor creates everything else."""
        return {"weights": self._weights}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore a state that `state_dict` returned."""
        self._weights = state["weights"]

    def _train_set(self) -> Samples:
        call = current_call()

        def load() -> Samples:
            dataset: TrainTest = load_dataset(self._dataset_recipe, call.trusted_modules)
            return dataset.train.to(call.device)

        return call.shared(("train_set", _key(self._dataset_recipe), str(call.device)), load)

    def _shared_initial_weights(self) -> Mapping[str, Tensor]:
        key = ("initial_weights", _key(self._model_recipe), self._seed)
        call = current_call()
        return call.shared(key, lambda: initial_weights(self._model_recipe, self._seed, call.trusted_modules))

    @contextmanager
    def _borrowed_model(self, weights: Mapping[str, Tensor] | None) -> Iterator[nn.Module]:
        """Lend a module with ``weights`` (default: the learner's weights), on the call's device.

        Idle modules are kept in a list for later calls: building a module costs more than a step of training, and a
        thousand clients do not need a thousand modules.
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
