"""Small models for small images. Any other ``torch.nn.Module`` can be used instead."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor, nn

from torchfedrpc.registry import model


@model("logistic")
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


@model("mlp")
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


@model("cnn")
class ConvNet(nn.Module):
    """Two convolutions of 3x3, each with ReLU and a max pool of 2x2, and one linear layer.

    By default it has no batch normalisation, since running statistics of skewed clients do not average well (Hsieh et
    al. 2020); for FedBN it may have.

    Args:
        image_size: Height and width of the inputs in pixels, a multiple of 4.
        in_channels: Number of channels of the inputs.
        channels: Numbers of channels of the first and the second convolution.
        num_classes: Number of logits.
        batch_norm: Whether batch normalisation follows each convolution.
    """

    def __init__(
        self,
        *,
        image_size: int = 8,
        in_channels: int = 1,
        channels: tuple[int, int] = (16, 32),
        num_classes: int = 10,
        batch_norm: bool = False,
    ) -> None:
        super().__init__()
        first, second = channels
        layers: list[nn.Module] = []
        for width_in, width_out in pairwise([in_channels, first, second]):
            layers.append(nn.Conv2d(width_in, width_out, kernel_size=3, padding=1))
            layers += [nn.BatchNorm2d(width_out)] if batch_norm else []
            layers += [nn.ReLU(), nn.MaxPool2d(2)]
        self.features = nn.Sequential(*layers)
        self.head = nn.Linear(second * (image_size // 4) ** 2, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Map images [batch, in_channels, image_size, image_size] to logits [batch, num_classes]."""
        logits: Tensor = self.head(self.features(images).flatten(1))
        return logits
