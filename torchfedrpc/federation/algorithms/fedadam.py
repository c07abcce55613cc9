"""FedAdam: Adam on the server."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import nn

from torchfedrpc.federation.algorithms.fedopt import FedOptTrainer
from torchfedrpc.federation.server_optimisers import ServerAdam
from torchfedrpc.registry import trainer


@trainer("fedadam")
class FedAdamTrainer(FedOptTrainer):
    """FedAvg with Adam on the server, without bias correction (Reddi et al. 2021, algorithm 2).

    With ``d = w - aggregate``: ``m = beta1 * m + (1 - beta1) * d``, ``v = beta2 * v + (1 - beta2) * d^2``,
    ``w = w - server_learning_rate * m / (sqrt(v) + tau)``. Defaults: 0.1, 0.9, 0.99 and 0.001; the betas are those of
    the paper, which tunes learning rate and ``tau``.
    """

    settings: ClassVar[Mapping[str, Any]] = {"server_learning_rate": 0.1, "beta1": 0.9, "beta2": 0.99, "tau": 1e-3}
    optimiser_class: ClassVar[type[ServerAdam]] = ServerAdam

    def make_optimiser(self, parameters: Sequence[nn.Parameter]) -> torch.optim.Optimizer:
        """Return an optimiser of ``optimiser_class``."""
        rate, tau = self._number("server_learning_rate", is_above=True), self._number("tau", is_above=True)
        betas = self._number("beta1", below=1), self._number("beta2", below=1)
        return self.optimiser_class(parameters, lr=rate, betas=betas, tau=tau)
