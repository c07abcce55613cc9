"""Adaptive optimisers of the server as Reddi et al. 2021 define them: without correction of the moments' bias.

`torch.optim.SGD` and `torch.optim.Adagrad` are the optimisers of FedAvgM and FedAdagrad as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor


class ServerAdam(torch.optim.Optimizer):
    """The optimiser of FedAdam (Reddi et al. 2021, algorithm 2).

    With the gradient ``g``: ``m = beta1 * m + (1 - beta1) * g``, ``v = beta2 * v + (1 - beta2) * g^2``, and
    ``w = w - lr * m / (sqrt(v) + tau)``; ``m`` begins at 0 and ``v`` at ``tau^2``.

    Args:
        params: The parameters.
        lr: Learning rate.
        betas: ``beta1`` and ``beta2``.
        tau: Degree of adaptivity, above 0: a small one adapts more.
    """

    def __init__(
        self, params: Iterable[Tensor], lr: float, betas: tuple[float, float] = (0.9, 0.99), tau: float = 1e-3
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "tau": tau})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take a step."""
        loss = None if closure is None else closure()
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for parameter in group["params"]:
                gradient, state = parameter.grad, self.state[parameter]
                if not state:
                    state["mean"] = torch.zeros_like(parameter)
                    state["variance"] = torch.full_like(parameter, group["tau"] ** 2)
                state["mean"].mul_(beta1).add_(gradient, alpha=1 - beta1)
                self._update(state["variance"], gradient * gradient, 1 - beta2)
                parameter.addcdiv_(state["mean"], state["variance"].sqrt().add_(group["tau"]), value=-group["lr"])
        return loss

    def _update(self, variance: Tensor, square: Tensor, rate: float) -> None:
        variance.mul_(1 - rate).add_(square, alpha=rate)


class ServerYogi(ServerAdam):
    """The optimiser of FedYogi: as `ServerAdam`, with ``v = v - (1 - beta2) * g^2 * sign(v - g^2)``."""

    def _update(self, variance: Tensor, square: Tensor, rate: float) -> None:
        variance.sub_(square * torch.sign(variance - square), alpha=rate)
