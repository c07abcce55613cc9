"""FedAvg with a proximal term, which keeps clients' weights near the global weights."""

from __future__ import annotations

from typing import Any

from torchfedrpc.errors import ConfigError
from torchfedrpc.federation.fedavg import FedAvgTrainer
from torchfedrpc.registry import trainer


@trainer("fedprox")
class FedProxTrainer(FedAvgTrainer):
    """FedAvg with clients that minimise their loss plus ``mu / 2 * ||w - w_global||^2`` (Li et al. 2020).

    The config has ``mu`` (>= 0) beside FedAvg's settings; learners receive it as ``proximal_mu``.
    """

    def local_settings(self) -> dict[str, Any]:
        """Return FedAvg's arguments and ``proximal_mu``.

        Raises:
            ConfigError: If the config has no valid ``mu``.
        """
        mu = getattr(self.config, "mu", None)
        if not isinstance(mu, int | float) or not mu >= 0:
            raise ConfigError(f"FedProx needs mu, a number of at least 0, in the trainer's settings; it is {mu!r}")
        return {**super().local_settings(), "proximal_mu": mu}
