"""Labelled samples as two tensors, and their split into training and test set."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from torchfedrpc.errors import ConfigError


@dataclass(frozen=True)
class Samples:
    """Labelled samples.

    Attributes:
        inputs: [num_samples, ...], float32.
        labels: [num_samples], int64; classes are numbered from 0.
        groups: [num_samples], int64; the natural client of each sample (a writer, a user), numbered from 0. None for
            data without.
    """

    inputs: Tensor
    labels: Tensor
    groups: Tensor | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, indices: Tensor) -> Samples:
        """Return a copy of the samples at these indices (int64), in their order."""
        groups = None if self.groups is None else self.groups[indices]
        return Samples(self.inputs[indices], self.labels[indices], groups)

    def batches(self, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Return batches of inputs and labels, as views, in order; the last batch may be smaller."""
        return zip(torch.split(self.inputs, batch_size), torch.split(self.labels, batch_size), strict=True)

    def to(self, device: torch.device) -> Samples:
        """Return these samples on a device, without a copy if they are already there."""
        groups = None if self.groups is None else self.groups.to(device)
        return Samples(self.inputs.to(device), self.labels.to(device), groups)


@dataclass(frozen=True)
class TrainTest:
    """Dataset of an experiment: the clients' training set, and the held-out test set."""

    train: Samples
    test: Samples


def stratified_split(samples: Samples, *, test_fraction: float, seed: int) -> TrainTest:
    """Split off a fraction of every class as test set, drawn from ``seed``.

    Raises:
        ConfigError: If a class would have no sample in one of the sets.
    """
    if not 0 < test_fraction < 1:
        raise ConfigError(f"dataset.test_fraction must be between 0 and 1, it is {test_fraction}")
    generator = np.random.default_rng(seed)
    labels = samples.labels.numpy()
    train, test = [], []
    for label in np.unique(labels):
        members = generator.permutation(np.flatnonzero(labels == label))
        num_test = round(test_fraction * len(members))
        if not 0 < num_test < len(members):
            raise ConfigError(
                f"dataset.test_fraction={test_fraction} leaves nothing to train or to test on of class "
                f"{label}, which has {len(members)} samples: take a fraction nearer to 0.5, or more samples"
            )
        test.append(members[:num_test])
        train.append(members[num_test:])
    return TrainTest(*(samples.take(torch.from_numpy(np.sort(np.concatenate(part)))) for part in (train, test)))
