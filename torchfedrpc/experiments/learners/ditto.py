"""Learner of Ditto: a personal model beside the global one."""

from __future__ import annotations

from typing import Any

from torchfedrpc.experiments.learners.personal import PersonalLearner
from torchfedrpc.experiments.training import copy_weights, proximal, trained_parameters
from torchfedrpc.federation.aggregation import StateDict
from torchfedrpc.registry import learner


@learner("ditto")
class DittoLearner(PersonalLearner):
    """Learner with a personal model ``v``, which is kept near the global one ``w`` (Ditto, Li et al. 2021).

    Each call trains from ``w`` as FedAvg does, and then ``v`` on the client's loss plus ``penalty / 2 * ||v -
    w||^2``. The learner is scored by its personal model.

    Args:
        client_id: The client of this learner.
        settings: As `ClassificationLearner`.
    """

    def train_epoch(  # type: ignore[override]
        self, model_weights: StateDict | None = None, *, penalty: float, personal_epochs: int = 1, **arguments: Any
    ) -> dict[str, Any]:
        """Train a copy of the global model, and the personal model.

        Args:
            model_weights: Global weights ``w``, a state dict.
            penalty: Ditto's lambda, at least 0; 0 trains each client alone.
            personal_epochs: Number of passes over the client's samples for the personal model.
            arguments: As in `ClassificationLearner.train_epoch`.

        Returns:
            What `ClassificationLearner.train_epoch` returns, for the copy of the global model.
        """
        centre = self.get_model_weights() if model_weights is None else model_weights
        with self._all_or_nothing():
            result = super().train_epoch(centre, **arguments)
            training = self._training_of(arguments.get("round_num", 0), arguments.get("learning_rate"))
            model = self._model(centre)
            pull = proximal(trained_parameters(model), penalty)
            if self._personal is not None:
                model.load_state_dict(self._personal)
            self._fit(model, training, [pull], local_epochs=personal_epochs)
            self._personal = copy_weights(model)
        return result

    def evaluate(self, model_weights: StateDict | None = None) -> dict[str, Any]:
        """Score the personal model on the client's samples; the given weights before the first training."""
        return super().evaluate(model_weights if self._personal is None else self._personal)
