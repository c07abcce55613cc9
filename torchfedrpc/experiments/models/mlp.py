"""A multilayer perceptron."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor, nn


class MLP(nn.Module):
    """Linear layers with ReLU between them.

    Args:
        num_inputs: features of a flattened sample.
        hidden: widths of the hidden layers.
        num_classes: logits to return.
    """

    def __init__(self, *, num_inputs: int = 64, hidden: Sequence[int] = (64,), num_classes: int = 10) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for width_in, width_out in pairwise([num_inputs, *hidden, num_classes]):
            layers += [nn.Linear(width_in, width_out), nn.ReLU()]
        self.layers = nn.Sequential(*layers[:-1])

    def forward(self, inputs: Tensor) -> Tensor:
        """From samples [batch, ...] of num_inputs features each to logits [batch, num_classes]."""
        logits: Tensor = self.layers(inputs.flatten(1))
        return logits
