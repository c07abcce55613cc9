"""Learner for classification."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from torchfedrpc.errors import ConfigError
from torchfedrpc.experiments.data.cache import load_dataset
from torchfedrpc.experiments.data.samples import Samples, TrainTest
from torchfedrpc.experiments.training import (
    Fitted,
    Hook,
    LocalTraining,
    build_model,
    copy_weights,
    fit,
    initial_weights,
    proximal,
    score,
    trained_names,
    trained_parameters,
)
from torchfedrpc.federation.aggregation import StateDict
from torchfedrpc.federation.compression import encode
from torchfedrpc.federation.learner_base import Learner
from torchfedrpc.host.context import current_call
from torchfedrpc.registry import learner

Recipe = Mapping[str, Any]


@learner("classification")
class ClassificationLearner(Learner):
    """Learner that trains a classifier on the client's share of a dataset, by SGD or another optimiser.

    Dataset and model are given as recipes and built on the learner's worker: the dataset once per process, the model
    for each call. `build` defines what recipes may name. A learner's only state is its weights, which it keeps with
    ``keep_weights``. Without, it is stateless, and calls have the weights they need as arguments.

    Args:
        client_id: The client of this learner.
        dataset: Recipe of a `TrainTest`.
        indices: [num_samples], int64; the client's samples to train on, of the training set.
        model: Recipe of a module that maps inputs to logits.
        seed: Seed of the initial weights, which are equal for all clients with the same seed.
        batch_size: Number of samples in a step of SGD.
        learning_rate: Learning rate of SGD.
        momentum: Momentum of SGD.
        weight_decay: Weight decay.
        learning_rate_decay: Factor of the learning rate per round of the trainer, above 0.
        optimiser: Recipe of another optimiser, see `LocalTraining`.
        schedule: Recipe of a schedule of the learning rate within a call.
        loss: Recipe of the loss. Default: Cross-entropy.
        max_gradient_norm: Norm to which the gradient of each step is clipped. Default: None.
        autocast: Whether forward passes run in bfloat16.
        keep_weights: Whether the learner has the weights of its last training, or of `set_model_weights`, in its next
            call. An experiment with False declares its learners stateless.
        held_out: [num_held_out], int64; the client's samples to score on, of the training set. Default: ``indices``.
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
        learning_rate_decay: float = 1.0,
        optimiser: Recipe | None = None,
        schedule: Recipe | None = None,
        loss: Recipe | None = None,
        max_gradient_norm: float | None = None,
        autocast: bool = False,
        keep_weights: bool = True,
        held_out: npt.NDArray[np.int64] | None = None,
    ) -> None:
        super().__init__(client_id)
        self._dataset_recipe = dataset
        self._model_recipe = model
        self._seed = seed
        self._indices = torch.from_numpy(indices)
        self._scored = self._indices if held_out is None else torch.from_numpy(held_out)
        self._training = LocalTraining(
            batch_size,
            learning_rate,
            momentum,
            weight_decay,
            optimiser=optimiser,
            schedule=schedule,
            loss=loss,
            max_gradient_norm=max_gradient_norm,
            autocast=autocast,
        )
        if not learning_rate_decay > 0:
            raise ConfigError(f"learner.learning_rate_decay is above 0, not {learning_rate_decay!r}")
        self._learning_rate_decay = learning_rate_decay
        if not isinstance(keep_weights, bool):
            raise ConfigError(f"keep_weights is True or False, not {keep_weights!r:.200}")
        self._keeps_weights = keep_weights
        self._weights: Mapping[str, Tensor] | None = None
        self._residual: StateDict = {}  # what top_k left out of the updates so far

    def train_epoch(
        self,
        model_weights: StateDict | None = None,
        round_num: int = 0,
        local_epochs: int = 1,
        local_steps: int | None = None,
        learning_rate: float | None = None,
        proximal_mu: float = 0.0,
        normalise: bool = False,
        compression: str | None = None,
        compression_ratio: float = 1.0,
    ) -> dict[str, Any]:
        """Train for some epochs, and keep the result as the learner's weights with ``keep_weights``.

        Args:
            model_weights: Initial weights, a state dict. Default: The learner's weights.
            round_num: The trainer's round, by which the learning rate decays.
            local_epochs: Number of passes over the client's samples.
            local_steps: Number of steps instead.
            learning_rate: Learning rate. Default: The learner's learning rate.
            proximal_mu: Coefficient of FedProx's proximal term, relative to the initial weights.
            normalise: Whether to divide the change of the weights by the accumulated weight of its gradients, for
                FedNova.
            compression: Codec of `torchfedrpc.federation.compression`. Default: None.
            compression_ratio: Fraction of the values that ``top_k`` takes.

        Returns:
            ``model_weights`` (a state dict), or with ``compression`` ``update``; ``num_samples``, and ``train_loss``
            (mean loss); with ``normalise`` also ``gradient_weight``.

        Raises:
            CancelledError: If the call was cancelled; the learner's weights are unchanged.
            ConfigError: If no weights are given, and the learner keeps none.
            FloatingPointError: If the loss or a weight is no longer finite; the learner's weights are unchanged.
        """
        received = self.get_model_weights() if model_weights is None else model_weights
        training = self._training_of(round_num, learning_rate)
        model = self._model(received)
        trained = trained_names(model)
        before = {name: model.get_parameter(name).detach().clone() for name in trained} if normalise else {}
        hooks = self.gradient_hooks(model)
        if proximal_mu:
            hooks.append(proximal(trained_parameters(model), proximal_mu))
        fitted = self._fit(model, training, hooks, local_epochs=local_epochs, local_steps=local_steps)
        weights = copy_weights(model)
        result: dict[str, Any] = {"num_samples": len(self._indices), "train_loss": fitted.loss}
        if normalise:
            result["gradient_weight"] = training.gradient_weight(fitted.num_steps)
            divisor = result["gradient_weight"] or 1
            weights |= {name: old + (weights[name] - old) / divisor for name, old in before.items()}
        result = {"model_weights": weights, **result}
        returned = self._compressed(result, received, trained, compression, compression_ratio)
        if self._keeps_weights:
            self._weights = weights
        return returned

    def gradient_hooks(self, model: nn.Module) -> list[Hook]:
        """Return functions that change the gradients before each step, for subclasses with a term of their own.

        Each is called with the trained parameters, in the order of ``model.parameters()``, after `backward` and
        before gradients are clipped. Here there are none.

        Args:
            model: The model at the beginning of a training, with the weights from which it starts.
        """
        return []

    def _compressed(
        self,
        result: dict[str, Any],
        received: StateDict,
        trained: Collection[str],
        compression: str | None,
        ratio: float,
    ) -> dict[str, Any]:
        """Return a result of `train_epoch` with ``update`` instead of ``model_weights``.

        Without ``compression`` it is unchanged. Of ``top_k`` the residual is kept for the next update.
        """
        if compression is None:
            return result
        residual = self._residual if compression == "top_k" else {}
        update, rest = encode(
            result.pop("model_weights"), received, trained, compression, ratio=ratio, residual=residual
        )
        self._residual = rest if compression == "top_k" else {}
        return {"update": update, **result}

    def _training_of(self, round_num: int, learning_rate: float | None) -> LocalTraining:
        """Return the settings of a call."""
        rate = self._training.learning_rate if learning_rate is None else learning_rate
        return dataclasses.replace(self._training, learning_rate=rate * self._learning_rate_decay**round_num)

    def _fit(
        self,
        model: nn.Module,
        training: LocalTraining,
        hooks: Sequence[Hook] = (),
        *,
        local_epochs: int = 1,
        local_steps: int | None = None,
    ) -> Fitted:
        """Train a model on the client's samples.

        Raises:
            CancelledError: If the call was cancelled.
            FloatingPointError: If the loss or a weight is no longer finite.
        """
        call = current_call()
        fitted = fit(
            model,
            self._train_set(),
            self._indices,
            num_epochs=local_epochs,
            num_steps=local_steps,
            training=training,
            hooks=hooks,
            is_cancelled=lambda: call.cancelled,
            trusted_modules=call.trusted_modules,
        )
        odd = [name for name, value in model.state_dict().items() if not value.isfinite().all()]
        if odd or not math.isfinite(fitted.loss):
            raise FloatingPointError(
                f"{self.client_id} has diverged: after {fitted.num_steps} steps the loss is {fitted.loss:g}, and "
                f"{', '.join(odd[:3]) or 'no weight'} is not finite; lower learner.learning_rate, or set "
                f"learner.max_gradient_norm"
            )
        return fitted

    def evaluate(self, model_weights: Mapping[str, Tensor] | None = None) -> dict[str, Any]:
        """Score a model on the client's held-out samples; on its samples to train on if it has no ``held_out``.

        Args:
            model_weights: A state dict. Default: The learner's weights.

        Returns:
            ``accuracy`` (0 to 1), ``loss`` (mean cross-entropy) and ``num_samples``; zeros without samples.

        Raises:
            ConfigError: If no weights are given, and the learner keeps none.
        """
        weights = self.get_model_weights() if model_weights is None else model_weights
        return dataclasses.asdict(score(self._model(weights), self._train_set().take(self._scored)))

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
        """Return the state for snapshots: weights, and residual of compression. The constructor creates the rest."""
        return {"weights": self._weights, "residual": self._residual}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore a state that `state_dict` returned."""
        self._weights, self._residual = state["weights"], state["residual"]

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

    def _model(self, weights: StateDict) -> nn.Module:
        """Return a new module with these weights, on the call's device.

        A module that another call has used would bring what a state dict lacks, such as a counter, and a copy of one
        may share functions with it.
        """
        call = current_call()
        model = build_model(self._model_recipe, self._seed, call.trusted_modules).to(call.device)
        model.load_state_dict(weights)
        return model


def _key(recipe: Recipe) -> str:
    return json.dumps(recipe, sort_keys=True)
