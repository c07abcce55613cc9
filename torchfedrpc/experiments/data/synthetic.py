"""Synthetic images: noisy copies of one random pattern per class. Needs only torch."""

from __future__ import annotations

import torch

from torchfedrpc.experiments.data.samples import Samples, TrainTest, stratified_split
from torchfedrpc.registry import dataset


@dataset("synthetic")
def synthetic(
    *,
    num_samples: int = 2000,
    num_classes: int = 10,
    image_size: int = 8,
    noise: float = 1.0,
    test_fraction: float = 0.2,
    seed: int = 0,
) -> TrainTest:
    """Generate images [num_samples, 1, image_size, image_size], float32, that a small model can learn.

    Args:
        num_samples: Number of samples of all classes; class sizes differ by at most one.
        num_classes: Number of classes, each with one pattern.
        image_size: Height and width in pixels. The default equals that of the digits, so that the same models fit.
        noise: Standard deviation of the noise per pixel; the patterns have a standard deviation of 1.
        test_fraction: Fraction of every class in the test set.
        seed: Seed of the patterns, the noise and the split.
    """
    generator = torch.Generator().manual_seed(seed)
    patterns = torch.randn(num_classes, 1, image_size, image_size, generator=generator)
    labels = torch.arange(num_samples) % num_classes
    inputs = patterns[labels]
    inputs += noise * torch.randn(inputs.shape, generator=generator)
    return stratified_split(Samples(inputs, labels), test_fraction=test_fraction, seed=seed)
