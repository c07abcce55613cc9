"""Multinomial logistic regression, a convex problem."""

from __future__ import annotations

from torch import Tensor, nn


class LogisticRegression(nn.Module):
    """Linear layer initialised to zero, as is usual for convex problems.

    Args:
        num_inputs: Number of features of a flattened sample.
        num_classes: Number of logits.
    """

    def __init__(self, *, num_inputs: int = 64, num_classes: int = 10) -> None:
        super().__init__()
        self.linear = nn.Linear(num_inputs, num_classes)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, inputs: Tensor) -> Tensor:
        """Map samples [batch, ...] of num_inputs features each to logits [batch, num_classes]."""
        logits: Tensor = self.linear(inputs.flatten(1))
        return logits
