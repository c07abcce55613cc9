"""Synthetic images: noisy copies of one random pattern for each class. Needs nothing beyond torch."""

from __future__ import annotations

import torch

from torchfedrpc.experiments.data.samples import Samples, TrainTest, stratified_split


def synthetic(
    *,
    num_samples: int = 2000,
    num_classes: int = 10,
    image_size: int = 8,
    noise: float = 1.0,
    test_fraction: float = 0.2,
    seed: int = 0,
) -> TrainTest:
    """Make images [num_samples, 1, image_size, image_size] that a small model can learn.

    Args:
        num_samples: of all classes together; the classes are equally large, to one sample.
        num_classes: how many patterns there are.
        image_size: height and width in pixels. 8, as in the digits, so that the same models fit.
        noise: standard deviation of the noise on each pixel; that of the patterns is 1.
        test_fraction: the share of every class that is held out.
        seed: draws the patterns, the noise and the held-out share.
    """
    generator = torch.Generator().manual_seed(seed)
    patterns = torch.randn(num_classes, 1, image_size, image_size, generator=generator)
    labels = torch.arange(num_samples) % num_classes
    inputs = patterns[labels]
    inputs += noise * torch.randn(inputs.shape, generator=generator)
    return stratified_split(Samples(inputs, labels), test_fraction=test_fraction, seed=seed)
