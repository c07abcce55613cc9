"""FedProx: clients stay near the global model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torchfedrpc.errors import ConfigError
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
        mu = getattr(self.config, "mu", None)
        if not isinstance(mu, int | float) or not mu >= 0:
            raise ConfigError(f"FedProx needs mu, a number of at least 0, in the trainer's settings; it is {mu!r}")
        return {**super().local_settings(), "proximal_mu": mu}
