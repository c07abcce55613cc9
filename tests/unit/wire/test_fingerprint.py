"""Fingerprints: equal for values that are equal bit for bit, and a difference is told with its place."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from torchfedrpc.wire.fingerprint import difference, fingerprint


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (0.0, -0.0),
        (1, 1.0),
        (1, True),
        (torch.zeros(1), torch.zeros(1).neg()),
        (torch.zeros(1), torch.zeros(1, dtype=torch.float64)),
        (torch.zeros(2, 1), torch.zeros(1, 2)),
        (torch.zeros(1), nn.Parameter(torch.zeros(1))),
        ({"a": 1, "b": 2}, {"b": 2, "a": 1}),
        ({1}, {1, 2}),
        ({1}, frozenset({1})),
    ],
)
def test_a_fingerprint_tells_values_apart(one: Any, other: Any) -> None:
    assert fingerprint(one) != fingerprint(other)
    assert difference(one, other) is not None


def test_a_fingerprint_does_not_tell_one_object_from_two() -> None:
    text, twin = "a text of some length", "".join(["a text", " of some length"])
    tensor = torch.arange(6.0).reshape(2, 3)
    assert fingerprint([text, text]) == fingerprint([text, twin])
    assert fingerprint([tensor, tensor]) == fingerprint([tensor, tensor.clone()])
    assert fingerprint(tensor.t()) == fingerprint(tensor.clone().t())
    crowded = {0, 8}  # these two collide in a table of eight, so that the first to come is the first in order
    assert list(crowded) != list({8, 0})
    assert fingerprint(crowded) == fingerprint({8, 0})


def test_values_that_refer_to_themselves_have_a_fingerprint() -> None:
    one: list[Any] = [1]
    one.append(one)
    other: list[Any] = [1]
    other.append(other)
    assert difference(one, other) is None
    other[0] = 2
    assert difference(one, other) == "[0] (1 instead of 2)"


def test_a_difference_is_told_with_its_way() -> None:
    assert difference({"a": [1, {"b": 2}]}, {"a": [1, {"b": 3}]}) == "['a'][1]['b'] (2 instead of 3)"
    assert difference({"a": 1}, {"a": 1, "b": 2}) == "['b'] (missing)"
    assert difference(nn.Linear(1, 1), nn.Linear(1, 1)) == "._parameters['weight']"
    assert difference([1], (1,)) == " (a list instead of a tuple)"
    assert difference(torch.ones(1), torch.zeros(1)) == ""
