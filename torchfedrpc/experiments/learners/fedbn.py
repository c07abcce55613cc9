"""Learner of FedBN: its batch normalisation stays with the client."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from torchfedrpc.experiments.learners.personal import PersonalLearner
from torchfedrpc.experiments.training import trained_names
from torchfedrpc.federation.aggregation import StateDict
from torchfedrpc.federation.algorithms.fedbn import personal_names
from torchfedrpc.registry import learner


@learner("fedbn")
class FedBNLearner(PersonalLearner):
    """Learner whose batch normalisation, statistics included, never leaves the client (FedBN, Li et al. 2021).

    What it returns has the personal entries of the weights that it received, so their mean is unchanged. It scores
    models with its own entries in place.

    Args:
        client_id: The client of this learner.
        settings: As `ClassificationLearner`.
    """

    def train_epoch(  # type: ignore[override]
        self,
        model_weights: StateDict | None = None,
        *,
        personal: Sequence[str],
        compression: str | None = None,
        compression_ratio: float = 1.0,
        **arguments: Any,
    ) -> dict[str, Any]:
        """Train as `ClassificationLearner.train_epoch`, from the given weights with the personal entries in place.

        Args:
            model_weights: See there.
            personal: Patterns of the names of entries that stay with the client, as
                `torchfedrpc.federation.algorithms.fedbn.personal_names` takes them.
            compression: As there.
            compression_ratio: As there.
            arguments: As there.

        Raises:
            ConfigError: As there, and as in `personal_names`.
        """
        received = self.get_model_weights() if model_weights is None else model_weights
        names = personal_names(received, personal)
        trained = trained_names(self._model(received)) if compression else []
        with self._all_or_nothing():
            result = super().train_epoch(received, **arguments)
            weights = result["model_weights"]
            self._personal = {name: weights[name] for name in names}
            shared = {**result, "model_weights": {**weights, **{name: received[name] for name in names}}}
            return self._compressed(shared, received, trained, compression, compression_ratio)

    def _model(self, weights: StateDict) -> nn.Module:
        return super()._model({**weights, **(self._personal or {})})
