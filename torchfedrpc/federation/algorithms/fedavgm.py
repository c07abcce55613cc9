"""FedAvgM: momentum on the server."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import nn

from torchfedrpc.federation.algorithms.fedopt import FedOptTrainer
from torchfedrpc.registry import trainer


@trainer("fedavgm")
class FedAvgMTrainer(FedOptTrainer):
    """FedAvg with momentum on the server (Hsu et al. 2019).

    ``v = server_momentum * v + (w - aggregate)``, ``w = w - server_learning_rate * v``. Defaults: 1 and 0.9, of
    section 4 of the paper.
    """

    settings: ClassVar[Mapping[str, Any]] = {"server_learning_rate": 1.0, "server_momentum": 0.9}

    def make_optimiser(self, parameters: Sequence[nn.Parameter]) -> torch.optim.Optimizer:
        """Return `torch.optim.SGD` with momentum."""
        rate, momentum = self._number("server_learning_rate", is_above=True), self._number("server_momentum", below=1)
        return torch.optim.SGD(parameters, lr=rate, momentum=momentum)
