"""Learner of FedBN: its batch normalisation stays with the client."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from torchfedrpc.errors import ConfigError
from torchfedrpc.experiments.learners.personal import PersonalLearner
from torchfedrpc.experiments.training import trained_names
from torchfedrpc.federation.aggregation import StateDict
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
            personal: Patterns of the names of entries that stay with the client, such as ``["head.*"]``. Empty: Those
                of all batch normalisation layers.
            compression: As there.
            compression_ratio: As there.
            arguments: As there.

        Raises:
            ConfigError: As there; and if the model has no personal entries.
        """
        received = self.get_model_weights() if model_weights is None else model_weights
        with super()._borrowed_model(received) as model:
            names, trained = _personal_names(model, personal), trained_names(model)
        result = super().train_epoch(received, **arguments)
        weights = result["model_weights"]
        self._personal = {name: weights[name] for name in names}
        shared = {**result, "model_weights": {**weights, **{name: received[name] for name in names}}}
        return self._compressed(shared, received, trained, compression, compression_ratio)

    @contextmanager
    def _borrowed_model(self, weights: StateDict | None) -> Iterator[nn.Module]:
        shared = self.get_model_weights() if weights is None else weights
        with super()._borrowed_model({**shared, **(self._personal or {})}) as model:
            yield model


def _personal_names(model: nn.Module, given: Sequence[str]) -> list[str]:
    layers = [name for name, module in model.named_modules() if isinstance(module, _BatchNorm)]
    patterns = given or [f"{name}.*" for name in layers]
    names = [name for name in model.state_dict() if any(fnmatchcase(name, pattern) for pattern in patterns)]
    if not names:
        raise ConfigError(
            f"FedBN keeps {', '.join(given) or 'batch normalisation'} at the clients, and the model has none of it: "
            f"take a model that has (model=cnn with model.batch_norm=true), or name other entries in "
            f"trainer.personal=[...]; it has {list(model.state_dict())!s:.300}"
        )
    return names
