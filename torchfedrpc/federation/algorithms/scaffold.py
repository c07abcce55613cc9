"""SCAFFOLD: control variates against the drift of clients."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from torchfedrpc.errors import ConfigError
from torchfedrpc.federation.algorithms.fedavg import FedAvgTrainer
from torchfedrpc.registry import trainer


@trainer("scaffold")
class ScaffoldTrainer(FedAvgTrainer):
    """FedAvg with control variates ``c`` of the server and ``c_i`` of the clients (Karimireddy et al. 2020, ICML).

    Clients make steps ``y = y - eta * (g + c - c_i)``. Then ``w = w + server_learning_rate * mean(y_i - w)`` and ``c
    = c + |S| / N * mean(change of c_i)`` over the ``|S|`` clients of the cohort, of ``N``; clients count alike, as in
    the paper. Its learner is ``scaffold``, whose state is ``c_i``. Default of ``server_learning_rate``: 1, as in
    section 7.

    Attributes:
        control: ``c``, a tensor for each trained parameter, by name; empty before the first round.
    """

    settings: ClassVar[Mapping[str, Any]] = {"weighting": "uniform", "server_learning_rate": 1.0}
    averaged: ClassVar[tuple[str, ...]] = ("train_loss", "control_change")
    keeps_learner_state: ClassVar[bool] = True

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.control: Mapping[str, Tensor] = {}
        self._number("server_learning_rate", is_above=True)
        if not self._is_uniform:
            raise ConfigError("SCAFFOLD's clients count alike: set the trainer's weighting to uniform")

    def local_settings(self) -> dict[str, Any]:
        """Return FedAvg's arguments and ``server_control``."""
        return {**super().local_settings(), "server_control": self.control}

    def step(self, aggregate: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Return the new global weights, and replace ``control``."""
        share = self.num_results / len(self.learner_proxy.client_ids)
        change = self.averages["control_change"]
        zeros = {name: torch.zeros_like(value) for name, value in change.items()}
        self.control = {name: old + share * change[name] for name, old in (self.control or zeros).items()}
        rate = self._number("server_learning_rate", is_above=True)
        return aggregate if rate == 1 else self.moved(aggregate, rate)
