"""FedAdagrad: Adagrad on the server."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import nn

from torchfedrpc.federation.algorithms.fedopt import FedOptTrainer
from torchfedrpc.registry import trainer


@trainer("fedadagrad")
class FedAdagradTrainer(FedOptTrainer):
    """FedAvg with Adagrad on the server (Reddi et al. 2021, algorithm 2, with ``beta1 = 0``).

    With ``d = w - aggregate``: ``v = v + d^2``, ``w = w - server_learning_rate * d / (sqrt(v) + tau)``; ``v`` begins
    at ``tau^2``. Defaults: 0.1 and 0.001, within the ranges of the paper's appendix D.
    """

    settings: ClassVar[Mapping[str, Any]] = {"server_learning_rate": 0.1, "tau": 1e-3}

    def make_optimiser(self, parameters: Sequence[nn.Parameter]) -> torch.optim.Optimizer:
        """Return `torch.optim.Adagrad`."""
        tau = self._number("tau", is_above=True)
        rate = self._number("server_learning_rate", is_above=True)
        return torch.optim.Adagrad(parameters, lr=rate, eps=tau, initial_accumulator_value=tau**2)
