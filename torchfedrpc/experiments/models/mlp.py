"""Multilayer perceptron."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor, nn


class MLP(nn.Module):
    """Linear layers with ReLU between them.

    Args:
        num_inputs: Number of features of a flattened sample.
        hidden: Widths of the hidden layers.
        num_classes: Number of logits.
    """

    def __init__(self, *, num_inputs: int = 64, hidden: Sequence[int] = (64,), num_classes: int = 10) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for width_in, width_out in pairwise([num_inputs, *hidden, num_classes]):
            layers += [nn.Linear(width_in, width_out), nn.ReLU()]
        self.layers = nn.Sequential(*layers[:-1])

    def forward(self, inputs: Tensor) -> Tensor:
        """Map samples [batch, ...] of num_inputs features each to logits [batch, num_classes]."""
        logits: Tensor = self.layers(inputs.flatten(1))
        return logits
