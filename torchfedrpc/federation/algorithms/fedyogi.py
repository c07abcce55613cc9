"""FedYogi: Yogi on the server."""

from __future__ import annotations

from typing import ClassVar

from torchfedrpc.federation.algorithms.fedadam import FedAdamTrainer
from torchfedrpc.federation.server_optimisers import ServerAdam, ServerYogi
from torchfedrpc.registry import trainer


@trainer("fedyogi")
class FedYogiTrainer(FedAdamTrainer):
    """FedAdam with ``v = v - (1 - beta2) * d^2 * sign(v - d^2)`` (Reddi et al. 2021, algorithm 2)."""

    optimiser_class: ClassVar[type[ServerAdam]] = ServerYogi
