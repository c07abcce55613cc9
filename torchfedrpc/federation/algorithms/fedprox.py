"""FedProx: clients stay near the global model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torchfedrpc.federation.algorithms.fedavg import FedAvgTrainer
from torchfedrpc.registry import trainer


@trainer("fedprox")
class FedProxTrainer(FedAvgTrainer):
    """FedAvg with clients that minimise their loss plus ``mu / 2 * ||w - w_global||^2`` (Li et al. 2020, MLSys).

    The config has ``mu``, at least 0, beside FedAvg's settings; the paper takes the best of 0.001, 0.01, 0.1 and 1.
    Learners receive it as ``proximal_mu``.
    """

    settings: ClassVar[Mapping[str, Any]] = {"mu": None}

    def local_settings(self) -> dict[str, Any]:
        """Return FedAvg's arguments and ``proximal_mu``.

        Raises:
            ConfigError: If the config has no valid ``mu``.
        """
        return {**super().local_settings(), "proximal_mu": self._number("mu")}
