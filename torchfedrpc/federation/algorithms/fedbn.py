"""FedBN: batch normalisation stays with the clients."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, ClassVar

from torch import Tensor

from torchfedrpc.errors import ConfigError
from torchfedrpc.federation.algorithms.fedavg import FedAvgTrainer
from torchfedrpc.registry import trainer


def personal_names(names: Iterable[str], patterns: Sequence[str]) -> list[str]:
    """Return the names of the entries of a state dict that stay with the clients.

    Args:
        names: The names of all entries.
        patterns: Patterns of those that stay, such as ``["head.*"]``. Empty: The layers with running statistics.

    Raises:
        ConfigError: If a pattern matches nothing, or no entry or all of them would stay.
    """
    names = list(names)
    if not patterns:
        layers = [name.removesuffix("running_mean") for name in names if name.endswith("running_mean")]
        patterns = [f"{layer}*" for layer in layers]
    unmatched = [pattern for pattern in patterns if not any(fnmatchcase(name, pattern) for name in names)]
    if unmatched or not patterns:
        raise ConfigError(
            f"FedBN keeps {', '.join(unmatched) or 'batch normalisation'} at the clients, and the model has none of "
            f"it: take a model that has (model=cnn with model.batch_norm=true), or name other entries in "
            f"trainer.personal=[...]; it has {names!s:.300}"
        )
    found = [name for name in names if any(fnmatchcase(name, pattern) for pattern in patterns)]
    if len(found) == len(names):
        raise ConfigError(f"trainer.personal={list(patterns)!s:.200} matches the whole model, so no entry is global")
    return found


@trainer("fedbn")
class FedBNTrainer(FedAvgTrainer):
    """FedAvg whose clients keep their batch normalisation, statistics included (Li et al. 2021, ICLR).

    Its learner is ``fedbn``, whose state are these entries. Those of the global weights stay as they were in the
    beginning, so its models are for clients, who score them with their own: ``evaluate`` of the learners.
    ``personal`` has patterns of the names of entries to keep instead, such as ``["head.*"]``. By default these are
    the layers with running statistics.
    """

    settings: ClassVar[Mapping[str, Any]] = {"personal": ()}
    keeps_learner_state: ClassVar[bool] = True
    has_personal_models: ClassVar[bool] = True

    def local_settings(self) -> dict[str, Any]:
        """Return FedAvg's arguments and ``personal``."""
        return {**super().local_settings(), "personal": self._patterns()}

    def personal_names(self) -> frozenset[str]:
        """Return the names that ``personal`` matches."""
        return frozenset(personal_names(self.weights or {}, self._patterns()))

    def step(self, aggregate: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Return the aggregate, with the personal entries as they were, to the bit."""
        if self.weights is None:
            return aggregate
        return {**aggregate, **{name: self.weights[name] for name in self.personal_names()}}

    def _patterns(self) -> list[str]:
        given = self.setting("personal")
        return [given] if isinstance(given, str) else list(given or ())
