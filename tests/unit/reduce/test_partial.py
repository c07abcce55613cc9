"""Reducers and partial results on their way: they come back as they were, and forged ones are refused."""

from __future__ import annotations

import math
import weakref
from typing import Any

import numpy as np
import pytest
import torch
from summing import Brackets

import torchfedrpc as tfr
from torchfedrpc.reduce import numerics, reducers
from torchfedrpc.reduce.partial import open_nodes, open_reducer, pack_nodes, pack_reducer
from torchfedrpc.reduce.tree import Forest
from torchfedrpc.wire.allowlist import AllowList
from torchfedrpc.wire.packing import Parcel, pack
from torchfedrpc.wire.scan import is_plain_data

ALLOW = AllowList(["summing"])

VALUES: dict[str, Any] = {
    "tensor": torch.arange(3.0),
    "integers": torch.arange(3),
    "half": torch.ones(2, dtype=torch.bfloat16),
    "complex": torch.ones(2, dtype=torch.complex64).conj(),
    "bool": torch.tensor([True, False]),
    "transposed": torch.arange(6.0).reshape(2, 3).t(),
    "expanded": torch.ones(1).expand(4),
    "empty": torch.empty(0, 3),
    "scalar": torch.tensor(2.5),
    "sparse": torch.sparse_coo_tensor(torch.tensor([[0, 2]]), torch.tensor([1.0, 2.0]), (3,), check_invariants=True),
    "array": np.arange(4, dtype=np.int16),
    "number": 0.1,
    "large": 1 << 100,
    "imaginary": 1 + 2j,
    "nan": math.nan,
    "state": {"weight": torch.ones(2, 3), "bias": torch.zeros(2), "steps": torch.tensor(7), "loss": 0.5},
    "nested": {"list": [1, [torch.ones(1), {}]], "tuple": (1.0, (), (torch.ones(2), np.ones(2))), "empty": []},
    "keys": {0: 1.0, (1, "a"): torch.ones(1), None: 2},
}


def nodes_of(reducer: Any, *results: Any) -> Any:
    """The first results are those of neighbours, which are one node."""
    forest = Forest(reducer, 2 * len(results))
    for index, result in enumerate(results):
        forest.add(index + max(index - 1, 0), result)
    return forest.take()


def bits(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: bits(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(bits(item) for item in value)
    if isinstance(value, torch.Tensor) and value.is_sparse:
        value = value.coalesce()
        return "sparse", bits(value.indices()), bits(value.values())
    if isinstance(value, torch.Tensor):
        return value.dtype, tuple(value.shape), str(value.tolist())
    if isinstance(value, np.ndarray):
        return value.dtype, value.shape, str(value.tolist())
    return type(value), str(value)


def through_rpc(parcel: Any) -> Parcel:
    """Return a parcel as it arrives, on memory of its own."""
    return Parcel(parcel.head, parcel.views, [slot.clone() for slot in parcel.slots])


@pytest.mark.parametrize("name", VALUES)
@pytest.mark.parametrize("kind", [tfr.Sum, tfr.Mean])
def test_partial_results_come_back_as_they_were(name: str, kind: Any) -> None:
    result = VALUES[name]
    expected = [reducer.finish() for *_, reducer in nodes_of(kind(), result, result, result)]
    arrived = through_rpc(pack_nodes(nodes_of(kind(), result, result, result)))
    nodes = open_nodes(arrived, kind(), ALLOW)
    assert [(level, index) for level, index, _ in nodes] == [(1, 0), (0, 3)]
    assert [bits(reducer.finish()) for *_, reducer in nodes] == [bits(value) for value in expected]


def test_partial_results_are_merged_as_if_they_had_stayed() -> None:
    chance = torch.Generator().manual_seed(0)
    results = [
        {"model_weights": {"w": torch.randn(5, generator=chance)}, "num_samples": count} for count in (3, 0, 5, 0)
    ]
    [first, second, third] = nodes_of(tfr.WeightedMean(), *results)
    arrived = open_nodes(through_rpc(pack_nodes([first, second, third])), tfr.WeightedMean(), ALLOW)
    for nodes in ([first, second, third], arrived):
        nodes[0][2].merge(nodes[1][2])
        nodes[0][2].merge(nodes[2][2])
    assert torch.equal(first[2].finish()["w"], arrived[0][2].finish()["w"])


@pytest.mark.parametrize("num_sums", [1, 9])
@pytest.mark.parametrize("name", VALUES)
@pytest.mark.parametrize("kind", [tfr.Sum, tfr.Mean])
def test_last_merge_gives_the_same_bits_as_any_other(name: str, kind: Any, num_sums: int) -> None:
    values = []
    for merge in (kind.merge, kind.merge_last):
        left, right = kind(), kind()
        for reducer in (left, right, right):
            reducer.add(VALUES[name])
        left._num_sums = num_sums  # as of a sum of many clients, which goes on in float64
        merge(left, right)
        values.append(bits(left.finish()))
    assert values[0] == values[1]


def test_last_merge_has_one_sum_in_float64_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    alive: weakref.WeakSet[torch.Tensor] = weakref.WeakSet()
    most = 0
    added = numerics.added

    def noted(*args: Any) -> torch.Tensor:
        nonlocal most
        total = added(*args)
        alive.add(total)
        most = max(most, sum(one.dtype == torch.float64 for one in alive))
        return total

    monkeypatch.setattr(reducers, "added", noted)
    left, right = tfr.Mean(), tfr.Mean()
    for reducer in (left, right):
        reducer.add({str(number): torch.ones(3) for number in range(10)})
    left._num_sums = 9
    totals = {key: entry.total.data_ptr() for key, entry in left._entries.items()}
    left.merge_last(right)
    value = left.finish()
    assert most == 1
    assert {key: tensor.data_ptr() for key, tensor in value.items()} == totals


def test_last_merge_of_results_that_do_not_match_is_an_error_at_once() -> None:
    left, right = tfr.Mean(), tfr.Mean()
    left.add(torch.ones(2))
    right.add(torch.ones(3))
    with pytest.raises(ValueError, match="the result is a tensor"):
        left.merge_last(right)


def test_partial_results_of_a_bundled_reducer_are_plain_data_and_its_own_memory() -> None:
    nodes = nodes_of(tfr.Mean(), {"a": torch.ones(3), "b": torch.ones(3), "loss": 0.5})
    addresses = {entry.total.data_ptr() for entry in nodes[0][2]._entries.values() if entry.dtype is not None}
    parcel = pack_nodes(nodes)
    assert is_plain_data(parcel.head)
    assert {slot.data_ptr() for slot in parcel.slots} == addresses


def test_partial_results_of_a_user_s_reducer_are_objects() -> None:
    [(level, index, reducer)] = open_nodes(pack_nodes(nodes_of(Brackets(), "a", "b")), Brackets(), ALLOW)
    assert (level, index, reducer.finish()) == (1, 0, "(a+b)")
    assert open_nodes(pack_nodes([]), Brackets(), ALLOW) == []


@pytest.mark.parametrize(
    "reducer",
    [
        *(tfr.Mean(), tfr.Sum("loss"), tfr.Sum(0), tfr.Mean(["a", "b"]), tfr.Mean(("a", 1))),
        *(tfr.WeightedMean(), tfr.WeightedMean(0, 1), tfr.WeightedMean(None, "n")),
    ],
    ids=repr,
)
def test_bundled_reducer_arrives_as_it_was_given(reducer: Any) -> None:
    parcel = pack_reducer(reducer)
    assert parcel.head.find(b"torchfedrpc") == -1
    arrived = open_reducer(parcel, ALLOW)
    assert type(arrived) is type(reducer)
    assert vars(arrived) == vars(reducer)


def test_reducer_with_results_and_a_user_s_reducer_arrive_as_objects() -> None:
    begun = tfr.Sum()
    begun.add(2.0)
    arrived = open_reducer(pack_reducer(begun), ALLOW)
    arrived.add(3.0)
    assert arrived.finish() == 5.0
    assert type(open_reducer(pack_reducer(Brackets()), ALLOW)) is Brackets


@pytest.mark.parametrize(
    "data",
    [
        *((), (1,), ([], 1), ([], [1]), ([], [(0, 0, 1, 0)]), 3, None, "no", {}),
        ([("float9", False)], [(0, 0, 1, 0, (0, 0))]),
        ([("nn", False)], [(0, 0, 1, 0, (0, 0))]),
        ([(1, False)], [(0, 0, 1, 0, (0, 0))]),
        ([("float32", False)], [(0, 0, 1, 0, (1, 0))]),
        ([("float32", False)], [(0, 0, 1, 0, (0, 1))]),
        ([("float32", False)], [(0, 0, 1, 0, (0, "x"))]),
    ],
)
def test_partial_results_of_another_form_are_refused(data: Any) -> None:
    with pytest.raises(tfr.SerializationError, match=r"form that this version does not send|unknown dtype"):
        open_nodes(pack(data, beside=[torch.ones(1)]), tfr.Sum(), ALLOW)


@pytest.mark.parametrize(
    "data",
    [
        *([], [(0, 0, Brackets())], [(0, 0, Brackets()), (0, 1, Brackets())], (Brackets(), []), ([], Brackets())),
        *(([], [Brackets()]), ([], [(0, 0, 1, 0, Brackets())]), ([], [(0, 0, 1, 0, [Brackets()])])),
        *(([], [(0, 0, 1, 0, (-1, Brackets()))]), ([], [(0, 0, 1, 0, (Brackets(), 0))])),
        *(([], [(0, 0, Brackets(), 0, [])]), ([], [(0, 0, 1, Brackets(), [])]), ([], [(0, 0, 1, 0, (Brackets(),))])),
        *(([], [(0.0, 0, 1, 0, [])]), ([], [(0, True, 1, 0, [])])),
        ([("float32", False)], [(0, 0, 1, 0, (0, Brackets()))]),
        ([("float32", Brackets())], [(0, 0, 1, 0, (0, 0))]),
    ],
)
def test_objects_in_the_place_of_a_bundled_reducer_or_of_its_parts_are_refused(data: Any) -> None:
    with pytest.raises(tfr.SerializationError, match="form that this version does not send"):
        open_nodes(pack(data, beside=[torch.ones(1)]), tfr.Mean(), ALLOW)


@pytest.mark.parametrize("data", [[1], [(0, 0)], [(0.0, 0, Brackets())], [(0, True, Brackets())], {"x": 1}, 3, None])
def test_partial_results_of_a_users_reducer_that_are_no_nodes_are_refused(data: Any) -> None:
    with pytest.raises(tfr.SerializationError, match="form that this version does not send"):
        open_nodes(pack(data), Brackets(), ALLOW)


def test_parts_that_come_twice_are_refused_before_they_multiply() -> None:
    shared: Any = []
    for _ in range(64):  # 2**64 parts, if each were followed
        shared = [shared, shared]
    form = ([("float32", False)], [(0, 0, 1, 0, [(0, 0), (0, 0)])])
    ragged = torch.eye(2).to_sparse()
    special = ([("float32", False)], [(0, 0, 1, 0, [(0, ragged), (0, ragged)])])
    forged: list[Any] = [([], [(0, 0, 1, 0, shared)]), form, special]
    for data in forged:
        with pytest.raises(tfr.SerializationError, match="form that this version does not send"):
            open_nodes(pack(data, beside=[torch.ones(1)]), tfr.Mean(), ALLOW)


def test_parts_that_are_nested_too_deep_are_refused() -> None:
    for num_levels in (150, 1500):
        head = b"\x80\x04]](K\x00K\x00K\x01K\x00" + b"]" * num_levels + b"a" * (num_levels - 1) + b"ta\x86."
        assert is_plain_data(head)
        if num_levels == 150:
            assert len(open_nodes(Parcel(head, [], []), tfr.Mean(), ALLOW)) == 1
            continue
        with pytest.raises(tfr.SerializationError, match="form that this version does not send"):
            open_nodes(Parcel(head, [], []), tfr.Mean(), ALLOW)
