"""Samples of a user's own dataset: kinds of inputs and labels, and what is refused."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from conftest import needs
from torch.utils.data import Dataset, IterableDataset, TensorDataset

import torchfedrpc as tfr
from torchfedrpc.errors import ConfigError
from torchfedrpc.experiments.data.samples import SizedDataset


class Items(Dataset[Any]):
    """A map-style dataset as users write them."""

    def __init__(self, *items: Any) -> None:
        self._items = items

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, index: int) -> Any:
        return self._items[index]


def test_a_dataset_of_torch_becomes_samples_in_its_order() -> None:
    inputs = torch.rand(20, 3, 4, dtype=torch.float64)
    dataset: Any = TensorDataset(inputs, torch.arange(20))
    samples = tfr.Samples.of(dataset, groups=torch.arange(20) // 5)
    assert samples.inputs.dtype == torch.float32
    assert torch.equal(samples.inputs, inputs.float())
    assert samples.labels.tolist() == list(range(20))
    assert samples.groups is not None
    assert samples.groups.tolist() == [number // 5 for number in range(20)]
    assert tfr.Samples.of(dataset).groups is None
    named = tfr.Samples.of(dataset, groups=["west", "east"] * 10).groups
    assert named is not None
    assert named.tolist() == [1, 0] * 10  # in sorted order


@pytest.mark.parametrize(
    ("item", "expected"),
    [
        ((2, 1), 2.0),
        ([[1.5, 2], np.int32(1)], [1.5, 2.0]),
        ((np.array([[1, 2]], dtype=np.uint8), np.array([1])), [[1.0, 2.0]]),
        ((torch.tensor([True, False]), torch.tensor(1)), [1.0, 0.0]),
        ((np.float64(0.5), 1.0), 0.5),
        ((torch.ones(1, requires_grad=True), True), [1.0]),
    ],
)
def test_inputs_and_labels_may_be_of_any_numeric_type(item: Any, expected: Any) -> None:
    samples = tfr.Samples.of(Items(item, item))
    assert samples.inputs.tolist() == [expected, expected]
    assert samples.inputs.dtype == torch.float32
    assert not samples.inputs.requires_grad
    assert samples.labels.tolist() == [1, 1]


def test_images_become_channels_of_numbers_between_minus_1_and_1() -> None:
    needs("PIL")
    from PIL import Image

    pixels = np.zeros((2, 3, 3), dtype=np.uint8)
    pixels[0, 0], pixels[1, 2] = 255, [255, 0, 51]
    colour = Image.fromarray(pixels)
    samples = tfr.Samples.of(Items((colour, 0)))
    assert samples.inputs.shape == (1, 3, 2, 3)
    assert samples.inputs[0, :, 1, 2].tolist() == pytest.approx([1, -1, -0.6])
    assert torch.equal(tfr.Samples.of(Items((colour.convert("P"), 0))).inputs, samples.inputs)
    assert tfr.Samples.of(Items((colour.convert("L"), 0))).inputs.shape == (1, 1, 2, 3)
    assert tfr.Samples.of(Items((colour.convert("1"), 0))).inputs.unique().tolist() == [-1, 1]
    with pytest.raises(ConfigError, match="input 0 is a Image: numbers, arrays, tensors or images"):
        tfr.Samples.of(Items((colour.convert("I"), 0)))


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        yield 1, 0


@pytest.mark.parametrize(
    ("dataset", "groups", "message"),
    [
        (Stream(), None, r"^Stream: a map-style dataset is expected, with __len__ and __getitem__"),
        (Items(), None, r"^Items: there are no samples"),
        (Items((1, 0), {"input": 1}), None, r"^Items\[1\]: a pair \(input, label\) is expected, not a dict"),
        (Items((1, 0, 2)), None, r"^Items\[0\]: a pair \(input, label\) is expected, not a tuple"),
        (Items(("cat", 0)), None, r"^Items: input 0 is 'cat': numbers, arrays, tensors or images are expected"),
        (Items(([[1], [1, 2]], 0)), None, r"^Items: input 0 is a list: numbers"),
        (
            Items(([1], 0), ([1, 2], 0)),
            None,
            r"^Items: input 1 has shape \[2\], and input 0 has \[1\]: bring all to one shape first",
        ),
        (Items((1, 0), (1, "cat")), None, r"^Items: label 1 is 'cat': whole numbers from 0 are expected"),
        (Items((1, 0.5)), None, r"^Items: label 0 is 0\.5: whole numbers from 0"),
        (Items((1, float("nan"))), None, r"^Items: label 0 is nan: whole numbers from 0"),
        (Items((1, torch.tensor(-1))), None, r"^Items: label 0 is -1: whole numbers from 0"),
        (Items((1, [0, 1])), None, r"^Items: label 0 is a list: whole numbers from 0"),
        (Items((1, 0), (1, 0)), [0], r"^Items: there are 1 groups for 2 samples: give each one"),
        (Items((1, 0), (1, 0)), ["ann", 1], r"^Items: group 0 is 'ann': whole numbers from 0"),
    ],
)
def test_datasets_that_are_no_labelled_samples_are_refused(dataset: Any, groups: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        tfr.Samples.of(dataset, groups)


def test_parts_are_concatenated_with_their_groups() -> None:
    def part(number: int, groups: bool) -> tfr.Samples:
        return tfr.Samples.of(Items((number, number)), [number] if groups else None)

    with_groups = tfr.Samples.concatenated([part(2, True), part(1, True)])
    assert with_groups.groups is not None
    assert with_groups.groups.tolist() == with_groups.labels.tolist() == with_groups.inputs.tolist() == [2, 1]
    assert tfr.Samples.concatenated([part(2, False), part(1, False)]).groups is None


def test_most_datasets_of_torch_have_a_length() -> None:
    dataset: SizedDataset = Items((1, 0))
    assert len(dataset) == 1
