"""Second objects of plain structures: equal, independent, and made only of what they are known to be right for."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import nn

from torchfedrpc.wire.allowlist import AllowList
from torchfedrpc.wire.packing import pack
from torchfedrpc.wire.shared import SharedValue
from torchfedrpc.wire.twins import is_plain_structure, twin


class Pair(NamedTuple):
    left: int
    right: int


class Named(dict[str, int]):
    pass


SHARED = torch.ones(4)
TWICE = [1]
LONG = torch.arange(32.0)
PLAIN: dict[str, Any] = {
    "nothing": None,
    "numbers": {"a": 1, "b": [2.0, True, 3j], "c": ("text", b"bytes")},
    "a tensor": torch.arange(6).reshape(2, 3),
    "strides": torch.arange(6).reshape(2, 3).t(),
    "empty": [(), [], {}, torch.empty(0), ()],
    "state dict": nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3)).state_dict(),
}
OTHER: dict[str, Any] = {
    "a parameter": nn.Parameter(torch.ones(2)),
    "a gradient": torch.ones(2, requires_grad=True),
    "tied": [SHARED[:2], SHARED[2:]],
    "a tensor twice": [SHARED, SHARED],
    "a list twice": [TWICE, TWICE],
    "sparse": torch.eye(2).to_sparse(),
    "an array": np.ones(2),
    "a named tuple": Pair(1, 2),
    "a dict's class": Named(a=1),
    "with gaps": {"a": LONG[0:8:2], "b": LONG[9:16:2]},
    "a part": LONG[4:8],
    "a tensor as a key": {torch.ones(1): 1},
    "a set": {1, 2},
}


@pytest.mark.parametrize("name", PLAIN)
def test_a_twin_is_what_a_parcel_would_give_and_independent(name: str) -> None:
    obj = PLAIN[name]
    assert is_plain_structure(obj)
    assert same(twin(obj), pack(obj).open(AllowList([])))
    for tensor, other in zip(tensors(obj), tensors(twin(obj)), strict=True):
        assert tensor.untyped_storage()._cdata != other.untyped_storage()._cdata


@pytest.mark.parametrize("name", OTHER)
def test_what_is_more_than_that_has_no_twin(name: str) -> None:
    assert not is_plain_structure(OTHER[name])
    assert not is_plain_structure({"deep": [OTHER[name]]})


@pytest.mark.parametrize("name", [*PLAIN, *OTHER])
def test_each_opening_of_a_shared_value_gives_the_same(name: str) -> None:
    obj = {**PLAIN, **OTHER}[name]
    value, allow = SharedValue(pack(obj)), AllowList(["test_twins"])
    first = value.open(allow)
    for _ in range(2):
        again = value.open(allow)
        assert same(again, first)
        for tensor in tensors(again):
            tensor.detach().zero_()
    assert same(value.open(allow), first)


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
def test_a_twins_tensors_are_ordinary_ones_in_any_mode(mode: Any) -> None:
    with mode():
        made = twin({"w": torch.ones(2)})
    made["w"].requires_grad_().sum().backward()


def tensors(obj: Any) -> list[torch.Tensor]:
    if isinstance(obj, torch.Tensor):
        return [] if obj.is_sparse else [obj]
    inner = obj.values() if isinstance(obj, dict) else obj if isinstance(obj, list | tuple) else ()
    return [tensor for one in inner for tensor in tensors(one)]


def same(left: Any, right: Any) -> bool:
    """Types, values, strides and attributes alike."""
    if type(left) is not type(right):
        return False
    if isinstance(left, torch.Tensor):
        alike = left.dtype == right.dtype and left.requires_grad == right.requires_grad
        alike = alike and (left.is_sparse or left.stride() == right.stride())
        return alike and torch.equal(left.to_dense(), right.to_dense())
    if isinstance(left, np.ndarray):
        return bool((left == right).all())
    if isinstance(left, dict):
        attributes = [[*getattr(one, "__dict__", {}).items()] for one in (left, right)]
        return (
            len(left) == len(right)
            and all(map(same, left, right))
            and same([*left.values()], [*right.values()])
            and same(*attributes)
        )
    if isinstance(left, list | tuple):
        return len(left) == len(right) and all(map(same, left, right))
    return bool(left == right)
