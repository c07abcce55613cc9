"""FedOpt: an optimiser on the server."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from torchfedrpc.federation.algorithms.fedavg import FedAvgTrainer


class FedOptTrainer(FedAvgTrainer):
    """FedAvg with an optimiser on the server, for which ``weights - aggregate`` is the gradient (Reddi et al. 2021).

    Subclasses name the optimiser. Buffers, such as running statistics, and integers are no parameters: they become
    those of the aggregate.

    Raises:
        ConfigError: If there are no initial weights, or running statistics among them that ``buffers`` lacks.

    Attributes:
        server_optimiser: The optimiser.
    """

    not_state: ClassVar[frozenset[str]] = FedAvgTrainer.not_state | {"_parameters"}
    settings: ClassVar[Mapping[str, Any]] = {"server_learning_rate": 1.0}

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        names = self.parameter_names()
        assert self.weights is not None
        self._parameters = {name: nn.Parameter(self.weights[name].detach().clone()) for name in names}
        self.server_optimiser = self.make_optimiser(list(self._parameters.values()))

    @abstractmethod
    def make_optimiser(self, parameters: Sequence[nn.Parameter]) -> torch.optim.Optimizer:
        """Return the server's optimiser of the parameters."""

    def step(self, aggregate: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Return the new global weights, after a step of the optimiser."""
        assert self.weights is not None
        with torch.no_grad():
            for name, parameter in self._parameters.items():
                parameter.copy_(self.weights[name])  # of a checkpoint, after a resume
                parameter.grad = parameter - aggregate[name]
        self.server_optimiser.step()
        return {**aggregate, **{name: value.detach().clone() for name, value in self._parameters.items()}}
