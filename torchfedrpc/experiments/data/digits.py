"""Handwritten digits: 1,797 real images of 8x8 pixels in 10 classes, included in scikit-learn."""

from __future__ import annotations

import torch

from torchfedrpc.experiments import extras
from torchfedrpc.experiments.data.samples import Samples, TrainTest, stratified_split
from torchfedrpc.registry import dataset

_HALF_RANGE = 8.0  # pixels range from 0 to 16


@dataset("digits")
def digits(*, test_fraction: float = 0.2, seed: int = 0) -> TrainTest:
    """Load the digits; inputs are [num_samples, 1, 8, 8], float32, between -1 and 1.

    The images are the test part of "Optical Recognition of Handwritten Digits" (Alpaydin and Kaynak 1998).

    Args:
        test_fraction: Fraction of every class in the test set.
        seed: Seed of the split.

    Raises:
        ConfigError: If scikit-learn is not installed.
    """
    extras.require("sklearn", "the digits dataset (dataset=synthetic does without)")
    from sklearn.datasets import load_digits  # noqa: PLC0415 - optional, and takes a second to import

    bunch = load_digits()
    samples = Samples(
        inputs=torch.from_numpy(bunch.images).float().unsqueeze(1) / _HALF_RANGE - 1,
        labels=torch.from_numpy(bunch.target).long(),
    )
    return stratified_split(samples, test_fraction=test_fraction, seed=seed)
