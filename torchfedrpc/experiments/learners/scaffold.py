"""Learner of SCAFFOLD: local SGD corrected by control variates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from torchfedrpc.errors import ConfigError
from torchfedrpc.experiments.learners.classification import ClassificationLearner
from torchfedrpc.experiments.training import Hook, copy_weights, trained_names, trained_weights
from torchfedrpc.federation.aggregation import StateDict
from torchfedrpc.registry import learner


@learner("scaffold")
class ScaffoldLearner(ClassificationLearner):
    """Learner for `torchfedrpc.ScaffoldTrainer`, which keeps its control variate (Karimireddy et al. 2020, option
    II).

    Each step's gradient is corrected to ``g + c - c_i``. After ``K`` steps with learning rate ``eta`` from the
    weights ``x`` to ``y``, the new control variate is ``c_i - c + (x - y) / (K * eta)``.

    Args:
        client_id: The client of this learner.
        settings: As `ClassificationLearner`; plain SGD, without momentum.

    Raises:
        ConfigError: If another optimiser, momentum or a schedule is set.
    """

    def __init__(self, client_id: str, **settings: Any) -> None:
        super().__init__(client_id, **settings)
        if not self._training.learning_rate:
            raise ConfigError("SCAFFOLD divides by the learning rate: set learner.learning_rate above 0")
        if self._training.momentum or self._training.optimiser is not None or self._training.schedule is not None:
            raise ConfigError(
                "SCAFFOLD's control variates are those of plain SGD: set learner.momentum=0, and learner.optimiser "
                "and learner.schedule to null"
            )
        self._control: dict[str, Tensor] | None = None

    def train_epoch(  # type: ignore[override]
        self,
        model_weights: StateDict | None = None,
        round_num: int = 0,
        local_epochs: int = 1,
        local_steps: int | None = None,
        learning_rate: float | None = None,
        *,
        server_control: StateDict,
        compression: str | None = None,
        compression_ratio: float = 1.0,
    ) -> dict[str, Any]:
        """Train, and replace the control variate.

        Args:
            model_weights: As in `ClassificationLearner.train_epoch`, like the arguments up to ``learning_rate``.
            round_num: See there.
            local_epochs: See there.
            local_steps: See there.
            learning_rate: See there.
            server_control: The server's control variate ``c``: a tensor for each trained parameter, by name; empty
                for zeros.
            compression: As in `ClassificationLearner.train_epoch`; of the weights, not of ``control_change``.
            compression_ratio: See there.

        Returns:
            ``model_weights`` or ``update``, ``num_samples``, ``train_loss``, and ``control_change``: the new
            control variate less the one before, by name.
        """
        training = self._training_of(round_num, learning_rate)
        received = self.get_model_weights() if model_weights is None else model_weights
        model = self._model(received)
        before, trained = trained_weights(model), trained_names(model)
        zeros = {name: torch.zeros_like(value) for name, value in before.items()}
        own, server = self._control or zeros, server_control or zeros
        correction = _adding([server[name] - own[name] for name in before])
        hooks = [*self.gradient_hooks(model), correction]
        fitted = self._fit(model, training, hooks, local_epochs=local_epochs, local_steps=local_steps)
        after = trained_weights(model)
        weights = copy_weights(model)
        if fitted.num_steps:
            scale = 1 / (fitted.num_steps * training.learning_rate)
            change = {name: (value - after[name]) * scale - server[name] for name, value in before.items()}
        else:
            change = zeros
        result = {
            "model_weights": weights,
            "num_samples": len(self._indices),
            "train_loss": fitted.loss,
            "control_change": change,
        }
        returned = self._compressed(result, received, trained, compression, compression_ratio)
        self._control = {name: own[name] + value for name, value in change.items()}
        if self._keeps_weights:
            self._weights = weights
        return returned

    def state_dict(self) -> dict[str, Any]:
        """Return the state for snapshots: the learner's weights and its control variate."""
        return {**super().state_dict(), "control": self._control}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore a state that `state_dict` returned."""
        super().load_state_dict(state)
        self._control = state["control"]


def _adding(corrections: Sequence[Tensor]) -> Hook:
    """Return the hook that adds to the gradients."""

    def add(parameters: Sequence[nn.Parameter]) -> None:
        for parameter, correction in zip(parameters, corrections, strict=True):
            if parameter.grad is not None:
                parameter.grad.add_(correction)

    return add
