"""FedNova: clients' changes are normalised by their numbers of steps."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor

from torchfedrpc.federation.algorithms.fedavg import FedAvgTrainer
from torchfedrpc.registry import trainer


@trainer("fednova")
class FedNovaTrainer(FedAvgTrainer):
    """FedAvg whose clients count alike for each step that they make (Wang et al. 2020, NeurIPS).

    ``w = w - tau_eff * sum(p_i * d_i)`` with ``d_i = (w - w_i) / ||a_i||_1`` and ``tau_eff = sum(p_i * ||a_i||_1)``,
    where ``p_i`` is the client's share of the samples, and ``||a_i||_1`` its number of steps, or more with momentum.
    Learners receive ``normalise=True``, and return ``w - d_i`` as ``model_weights`` and ``||a_i||_1`` as
    ``gradient_weight``.
    """

    averaged: ClassVar[tuple[str, ...]] = ("train_loss", "gradient_weight")

    def local_settings(self) -> dict[str, Any]:
        """Return FedAvg's arguments and ``normalise``."""
        return {**super().local_settings(), "normalise": True}

    def step(self, aggregate: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Return the new global weights."""
        return self.moved(aggregate, self.averages["gradient_weight"])
