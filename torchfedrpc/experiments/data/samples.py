"""Labelled samples as two tensors, and their split into training and test set."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from torchfedrpc.errors import ConfigError
from torchfedrpc.experiments.data.conversion import group_numbers, stack_inputs, whole_numbers


class SizedDataset(Protocol):
    """Map-style dataset with a length, such as most of `torch.utils.data.Dataset`."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any: ...


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

    @classmethod
    def of(cls, dataset: SizedDataset, groups: Sequence[int | str] | Tensor | None = None) -> Samples:
        """Return all samples of a map-style `torch.utils.data.Dataset`, read once in their order.

        Args:
            dataset: Gives pairs of an input (tensor, array, number, or image of PIL) and a label (a whole number from
                0). Numbers are kept, images become [channels, height, width] between -1 and 1. Transforms that draw
                random numbers draw once.
            groups: [num_samples]; the natural client of each sample: numbers from 0, or texts, which are numbered in
                sorted order.

        Raises:
            ConfigError: If it has no length, an item is no pair, inputs differ in shape, a label is no whole number
                from 0 or a group neither this nor a text, or the numbers of groups and samples differ.
        """
        name = type(dataset).__name__
        if not (hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")):
            raise ConfigError(f"{name}: a map-style dataset is expected, with __len__ and __getitem__")
        inputs, labels = [], []
        for number in range(len(dataset)):
            item = dataset[number]
            if not (isinstance(item, tuple | list) and len(item) == 2):
                raise ConfigError(f"{name}[{number}]: a pair (input, label) is expected, not a {type(item).__name__}")
            inputs.append(item[0])
            labels.append(item[1])
        numbers = None if groups is None else group_numbers(groups, f"{name}: group")
        if numbers is not None and len(numbers) != len(labels):
            raise ConfigError(f"{name}: there are {len(numbers)} groups for {len(labels)} samples: give each one")
        return cls(stack_inputs(inputs, name), whole_numbers(labels, f"{name}: label"), numbers)

    @classmethod
    def concatenated(cls, parts: Sequence[Samples]) -> Samples:
        """Return the samples of several parts in their order. Either all have groups, or none."""
        groups = [part.groups for part in parts if part.groups is not None]
        return cls(
            torch.cat([part.inputs for part in parts]),
            torch.cat([part.labels for part in parts]),
            torch.cat(groups) if groups else None,
        )

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
