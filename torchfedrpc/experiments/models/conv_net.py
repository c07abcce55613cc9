"""Small convolutional network."""

from __future__ import annotations

from torch import Tensor, nn


class ConvNet(nn.Module):
    """Two convolutions of 3x3, each with ReLU and a max pool of 2x2, and one linear layer.

    It has no batch normalisation, since running statistics of skewed clients do not average well (Hsieh et al. 2020).

    Args:
        image_size: Height and width of the inputs in pixels, a multiple of 4.
        in_channels: Number of channels of the inputs.
        channels: Numbers of channels of the first and the second convolution.
        num_classes: Number of logits.
    """

    def __init__(
        self,
        *,
        image_size: int = 8,
        in_channels: int = 1,
        channels: tuple[int, int] = (16, 32),
        num_classes: int = 10,
    ) -> None:
        super().__init__()
        first, second = channels
        self.features = nn.Sequential(
            nn.Conv2d(in_channels, first, kernel_size=3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(first, second, kernel_size=3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
        )
        self.head = nn.Linear(second * (image_size // 4) ** 2, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Map images [batch, in_channels, image_size, image_size] to logits [batch, num_classes]."""
        logits: Tensor = self.head(self.features(images).flatten(1))
        return logits
