"""Multinomial logistic regression, a convex problem."""

from __future__ import annotations

from torch import Tensor, nn


class LogisticRegression(nn.Module):
    """One linear layer that starts at zero, as is usual where the problem is convex.

    Args:
        num_inputs: features of a flattened sample.
        num_classes: logits to return.
    """

    def __init__(self, *, num_inputs: int = 64, num_classes: int = 10) -> None:
        super().__init__()
        self.linear = nn.Linear(num_inputs, num_classes)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, inputs: Tensor) -> Tensor:
        """From samples [batch, ...] of num_inputs features each to logits [batch, num_classes]."""
        logits: Tensor = self.linear(inputs.flatten(1))
        return logits
