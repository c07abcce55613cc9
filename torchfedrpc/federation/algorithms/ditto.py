"""Ditto: a personal model for each client, near the global one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torchfedrpc.federation.algorithms.fedavg import FedAvgTrainer
from torchfedrpc.registry import trainer


@trainer("ditto")
class DittoTrainer(FedAvgTrainer):
    """FedAvg, and beside it a personal model ``v_i`` of each client (Li et al. 2021, ICML).

    After its share of FedAvg, a client of the cohort makes ``personal_epochs`` passes of
    ``v = v - eta * (g(v) + penalty * (v - w))`` with the global weights ``w`` of the round's beginning. Its learner
    is ``ditto``, whose state is ``v_i``. ``penalty`` is the paper's lambda, of which it takes the best of 0.05, 0.1,
    1 and 2.
    """

    settings: ClassVar[Mapping[str, Any]] = {"penalty": 1.0, "personal_epochs": 1}
    keeps_learner_state: ClassVar[bool] = True
    has_personal_models: ClassVar[bool] = True

    def local_settings(self) -> dict[str, Any]:
        """Return FedAvg's arguments, ``penalty`` and ``personal_epochs``.

        Raises:
            ConfigError: If one is invalid.
        """
        personal_epochs = self._count("personal_epochs", default=1, least=0)
        return {**super().local_settings(), "penalty": self._number("penalty"), "personal_epochs": personal_epochs}
