"""FedBN: batch normalisation stays with the clients."""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Any, ClassVar

from torchfedrpc.federation.algorithms.fedavg import FedAvgTrainer
from torchfedrpc.registry import trainer


@trainer("fedbn")
class FedBNTrainer(FedAvgTrainer):
    """FedAvg whose clients keep their batch normalisation, statistics included (Li et al. 2021, ICLR).

    Its learner is ``fedbn``, whose state are these entries. Those of the global weights stay as they were in the
    beginning, so its models are for clients, who score them with their own: ``evaluate`` of the learners.
    ``personal`` has patterns of the names of entries to keep instead, such as ``["head.*"]``.
    """

    settings: ClassVar[Mapping[str, Any]] = {"personal": ()}

    def local_settings(self) -> dict[str, Any]:
        """Return FedAvg's arguments and ``personal``."""
        return {**super().local_settings(), "personal": list(getattr(self.config, "personal", ()))}

    def personal_names(self) -> frozenset[str]:
        """Return the names that ``personal`` matches; by default those of layers with running statistics."""
        weights = self.weights or {}
        layers = [name.removesuffix("running_mean") for name in weights if name.endswith("running_mean")]
        patterns = list(getattr(self.config, "personal", ())) or [f"{layer}*" for layer in layers]
        return frozenset(name for name in weights if any(fnmatchcase(name, pattern) for pattern in patterns))
