"""Damaged and invented input: whatever the bytes are, there is an object or an error of ours."""

from __future__ import annotations

import io
import pickle
import random
import sys
from collections import defaultdict, deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import hostile
import numpy as np
import pytest
import torch
from hostile import Trusted, harm
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from torchfedrpc.errors import SerializationError, SnapshotError, UntrustedTypeError
from torchfedrpc.host import snapshot
from torchfedrpc.host.snapshot import Snapshot
from torchfedrpc.rpc.guard import GuardedUnpickler
from torchfedrpc.wire import rebuild
from torchfedrpc.wire.allowlist import AllowList
from torchfedrpc.wire.packing import Parcel, pack
from torchfedrpc.wire.scan import MAX_DEPTH, check_opcodes, is_plain_data, with_requests
from torchfedrpc.wire.serializer import ParameterSerializer

ALLOW = AllowList([hostile.HERE])
bounded = settings(
    max_examples=250, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
)


def rich() -> dict[str, Any]:
    """An object of everything that an envelope can hold."""
    base = torch.arange(8.0)
    trusted = Trusted()
    trusted.weights, trusted.colour = base[2:], hostile.Colour.RED  # type: ignore[attr-defined]
    return {
        "ties": [base[:3], base[1:5]],
        "parameter": nn.Parameter(torch.ones(2, 2)),
        "coo": torch.eye(2).to_sparse(),
        "layer": nn.Linear(2, 1),
        "trusted": trusted,
        "small": np.arange(5, dtype=">i4"),
        "large": np.arange(2000.0),
        "fortran": np.ones((2, 3)).T[::2],
        "objects": np.array([1, "a", None], dtype=object),
        "records": np.array([(1, 2.5)], dtype=[("a", "i4"), ("b", "f8")]),
        "scalar": np.float32(2.5),
        "dates": np.array(["2024-02-29"], dtype="M8[D]"),
        "streams": [np.random.MT19937(1), np.random.Philox(1), np.random.default_rng(1), random.Random(1)],
        "generator": torch.Generator().manual_seed(1),
        "error": ValueError("ü", 3),
        "plain": [1, -5, 2**70, 2.5, None, True, b"b", "text", (3, (4,)), {5}, frozenset({6})],
        "same": [trusted, base],
    }


PARCEL = pack(rich())
STORED = snapshot.dump(Snapshot("client_1", "m.L", {"train": 3}, ("getstate", {"w": torch.ones(3)})), ALLOW)
PAYLOAD = snapshot.dump(Snapshot("client_1", "m.L", {"train": 3}, ("getstate", rich())), ALLOW)[
    snapshot._HEADER.size :
]
SERIALIZED = ParameterSerializer.serialize(vars(Snapshot("client_1", "m.L", {"train": 3}, ("getstate", rich()))))
TABLE, HEAD, MEMORY = hostile.parts_of(SERIALIZED)
OPCODES = sorted({value[0] for name, value in vars(pickle).items() if name.isupper() and isinstance(value, bytes)})


@st.composite
def damaged(draw: st.DrawFn, data: bytes | bytearray, first: int = 0) -> bytes:
    """The bytes with a few changes: bytes set (to opcodes, often), taken out, doubled, moved, put in."""
    changed = bytearray(data)
    for _ in range(draw(st.integers(1, 4))):
        start = draw(st.integers(first, max(first, len(changed) - 1)))
        length = draw(st.sampled_from([1, 1, 1, 2, 4, 8, 40]))
        piece = bytes(changed[start : start + length])
        kind = draw(st.sampled_from(["set", "opcode", "opcode", "remove", "double", "copy", "insert"]))
        if kind == "set":
            changed[start : start + length] = draw(st.binary(min_size=len(piece), max_size=len(piece)))
        elif kind == "opcode":
            changed[start : start + 1] = bytes([draw(st.sampled_from(OPCODES))])
        elif kind == "remove":
            del changed[start : start + length]
        elif kind == "double":
            changed[start:start] = piece
        elif kind == "copy":
            place = draw(st.integers(first, max(first, len(changed) - 1)))
            changed[place:place] = piece
        else:
            changed[start:start] = draw(st.binary(min_size=1, max_size=8))
    return bytes(changed)


def look_at(value: Any, depth: int = 0) -> None:
    """Use what was opened, as its receiver would: memory that is not there would end the process."""
    if depth > 6:
        return
    if isinstance(value, torch.Tensor) and value.layout is torch.strided and value.numel() < 10_000:
        value.detach().clone()
    elif isinstance(value, np.ndarray) and value.size < 10_000:
        value.tolist()
    elif isinstance(value, np.random.BitGenerator):
        np.random.Generator(value).random(700)
    elif isinstance(value, dict):
        for part in list(value.values()):
            look_at(part, depth + 1)
    elif isinstance(value, list | tuple | set | frozenset):
        for part in list(value):
            look_at(part, depth + 1)


# The envelope.


def test_what_is_fuzzed_is_well_formed() -> None:
    look_at(PARCEL.copy().open(ALLOW))
    assert hostile.serialized(HEAD, TABLE, MEMORY) == SERIALIZED
    for payload in (PAYLOAD, SERIALIZED):
        look_at(snapshot.load(hostile.snapshot_around(payload), ALLOW).state)
    assert snapshot.load(STORED, ALLOW).made


@bounded
@given(head=damaged(PARCEL.head))
def test_a_damaged_head_is_an_object_or_an_error_of_ours(head: bytes) -> None:
    fresh = PARCEL.copy()
    try:
        look_at(Parcel(head, fresh.views, fresh.slots).open(ALLOW))
    except SerializationError:
        pass
    assert harm() == []


@bounded
@given(
    head=st.lists(
        st.one_of(
            st.sampled_from(OPCODES).map(lambda op: bytes([op])),
            st.sampled_from([hostile.TRUSTED, hostile.RESTORE, hostile.EMPTY, hostile.NDARRAY, hostile.dtype("O")]),
            st.sampled_from([b"K\x00", b"K\x01", b"h\x00", b"h\x01", b"N", b")", b"]", b"}", b"\x94", b"R", b"b"]),
            st.sampled_from(["plain", "dense", "special", "exception", "a"]).map(hostile.text),
        ),
        max_size=40,
    )
)
def test_opcodes_in_any_order_are_an_object_or_an_error_of_ours(head: list[bytes]) -> None:
    try:
        look_at(hostile.parcel(hostile.whole(*head)).open(ALLOW))
    except SerializationError:
        pass
    assert harm() == []


numbers = st.one_of(
    st.integers(-3, 12), st.sampled_from([2**31, 2**32, 2**62, 2**63 - 1, -(2**62), 2**100]), st.none(), st.just(1.5)
)
dtypes = st.sampled_from(
    ["float32", "uint8", "int64", "complex128", "bfloat16", "bool", "qint8", "load", "Tensor", ""]
)
sizes = st.lists(numbers, max_size=3).map(tuple)
views = st.one_of(numbers, st.tuples(numbers, dtypes, sizes, sizes, numbers), st.text(max_size=2), st.just(()))


@bounded
@given(views=st.lists(views, max_size=4), data=st.data())
def test_invented_views_are_an_object_or_an_error_of_ours(views: Any, data: st.DataObject) -> None:
    slots = [
        data.draw(
            st.sampled_from([torch.zeros(4), torch.ones(3, 2).T, torch.zeros(0), torch.zeros(9, dtype=torch.uint8)])
        )
        for _ in range(data.draw(st.integers(0, 3)))
    ]
    parts = [
        hostile.called(hostile.RESTORE, hostile.text("plain"), b"K" + bytes([index])) for index in range(len(views))
    ]
    head = hostile.whole(b"](", *parts, b"e")
    try:
        look_at(Parcel(head, views, slots).open(ALLOW))
    except SerializationError:
        pass


@bounded
@given(data=damaged(pickle.dumps(({"a": [1, (2, b"x")]}, {3}), protocol=4)))
def test_a_damaged_message_of_rpc_is_an_object_or_refused(data: bytes) -> None:
    try:
        GuardedUnpickler(io.BytesIO(data)).load()
    except pickle.UnpicklingError:
        pass
    assert harm() == []


# Bytes and snapshots.


@bounded
@given(data=damaged(STORED))
def test_a_damaged_snapshot_is_always_noticed(data: bytes) -> None:
    if data == STORED:
        return
    with pytest.raises(SnapshotError):
        snapshot.load(data, ALLOW)


@bounded
@given(payload=damaged(PAYLOAD))
def test_damaged_bytes_with_a_right_checksum_of_the_snapshot_are_an_error_of_ours(payload: bytes) -> None:
    try:
        look_at(snapshot.load(hostile.snapshot_around(payload), ALLOW).state)
    except (SnapshotError, UntrustedTypeError):
        pass
    assert harm() == []


@bounded
@given(table=damaged(TABLE), head=damaged(HEAD), damage=st.sampled_from(["table", "head", "both"]))
def test_damaged_bytes_with_right_checksums_are_an_error_of_ours(table: bytes, head: bytes, damage: str) -> None:
    data = hostile.serialized(HEAD if damage == "table" else head, TABLE if damage == "head" else table, MEMORY)
    try:
        look_at(ParameterSerializer.deserialize(data, trusted_modules=[hostile.HERE]))
        look_at(snapshot.load(hostile.snapshot_around(data), ALLOW).state)
    except (SerializationError, SnapshotError):
        pass
    assert harm() == []


@bounded
@given(data=st.binary(max_size=80))
def test_noise_is_no_snapshot(data: bytes) -> None:
    with pytest.raises(SnapshotError):
        snapshot.load(data, ALLOW)


# The scan.


class _Opened(pickle.Unpickler):
    """Opens a pickle of plain data by the rules alone."""

    def __init__(self, data: bytes) -> None:
        super().__init__(io.BytesIO(with_requests(data)))

    def persistent_load(self, request: Any) -> Any:
        return rebuild.answer(ALLOW, rebuild.Budget(1 << 20), *request)


nested = st.recursive(
    st.one_of(st.none(), st.integers(), st.floats(allow_nan=False), st.text(max_size=300), st.binary(max_size=300)),
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.lists(inner, max_size=4).map(tuple),
        st.dictionaries(st.text(max_size=3), inner, max_size=4),
    ),
    max_leaves=30,
)


@bounded
@given(obj=nested, protocol=st.sampled_from([4, 5]))
def test_what_the_pickler_writes_is_opened_by_requests(obj: Any, protocol: int) -> None:
    data = pickle.dumps(obj, protocol)
    assert repr(_Opened(data).load()) == repr(obj)


@pytest.mark.parametrize(
    "obj",
    [None, True, 2**70, -1.5, "text", b"bytes", ((1, "a"), {"rate": 0.1}), {"loss": [1, 2.5], "of": {"a": (3,)}}],
)
def test_numbers_texts_and_containers_of_them_are_plain_data(obj: Any) -> None:
    assert is_plain_data(pack(obj).head)
    assert pack(obj).open(ALLOW) == obj


_TWICE: list[int] = [1]


@pytest.mark.parametrize(
    "head",
    [
        pack([_TWICE, _TWICE]).head,  # references could make a key of 2**40 parts
        pack({1}).head,
        pack(frozenset({1})).head,
        pack(bytearray(b"a")).head,
        pack(ValueError("a")).head,
        pack(len).head,
        pack("a" * 5000).head,
        pickle.dumps([1], 2).replace(b"]q\x00", b"]2"),
        pickle.dumps([1], 5)[:-1],
        pickle.dumps([1], 5) + b"N",
        b"\x80\x05cos\nsystem\n.",
        b"\x80\x05\x8c\x02os\x8c\x06system\x93.",
        b"\x80\x05K\x01Q.",
        b"\x80\x05K\x01\x82\x01.",
    ],
)
def test_other_pickles_are_no_plain_data(head: bytes) -> None:
    assert not is_plain_data(head)


@bounded
@given(
    operations=st.lists(st.sampled_from([bytes((op,)) for op in b"(N\x88\x89)]}t\x85\x86\x87aesu\x94"]), max_size=40)
)
def test_plain_data_in_any_order_is_an_object_or_an_error_of_ours(operations: list[bytes]) -> None:
    head = b"\x80\x05" + b"".join(operations) + b"."
    assert is_plain_data(head)
    try:
        look_at(Parcel(head, [], []).open(ALLOW))
    except SerializationError:
        pass


@bounded
@given(data=st.binary(max_size=60))
def test_the_scan_of_noise_ends_in_an_error_of_ours_or_in_a_pickle(data: bytes) -> None:
    try:
        check_opcodes(data)
        with_requests(data)
    except SerializationError:
        pass


# Depth.


@pytest.mark.parametrize("depth", [MAX_DEPTH, MAX_DEPTH + 1])
@pytest.mark.parametrize("opened", [b"]", b"]\x94"], ids=["plain", "memoized"])
def test_depth_of_lists_is_counted_to_the_level(depth: int, opened: bytes) -> None:
    parcel = hostile.parcel(hostile.whole(opened * depth, b"a" * (depth - 1), b"C\x01_0" * 2000))
    if depth == MAX_DEPTH:
        parcel.open(ALLOW)
        return
    with pytest.raises(SerializationError, match=f"more than {MAX_DEPTH} deep: send a flat list"):
        parcel.open(ALLOW)


def array_of(item: Any) -> Any:
    array = np.empty(1, object)
    array[0] = item
    return array


RECURSIVE = {
    "arrays": array_of,
    "deques": lambda item: deque([item]),
    "defaultdicts": lambda item: defaultdict(None, {1: item}),
    "slices": lambda item: slice(item),
    "in turns": lambda item: deque([array_of(defaultdict(None, {1: slice(item)}))]),
}


@pytest.mark.parametrize("kind", RECURSIVE)
def test_objects_that_are_freed_by_recursion_may_nest_a_little_and_no_more(kind: str) -> None:
    nested: Any = None
    for _ in range(50):
        nested = RECURSIVE[kind](nested)
    wide = [RECURSIVE[kind](RECURSIVE[kind](None)) for _ in range(1000)]
    pack([nested, wide]).open(ALLOW)
    for _ in range(700):
        nested = RECURSIVE[kind](nested)
    with recursion_limit(20_000), pytest.raises(SerializationError, match="more than 600 deep: send lists"):
        pack(nested).open(ALLOW)


@pytest.mark.parametrize("kind", ["deques", "defaultdicts"])
def test_objects_that_are_filled_after_they_were_put_into_others_count_as_deep(kind: str) -> None:
    make = hostile.named("collections", kind.removesuffix("s")) + b")R"
    put = b"a" if kind == "deques" else b"s"
    key = b"" if kind == "deques" else b"N"
    # Each is kept in the memo, put into the one before, and then takes the next one.
    head = make + b"\x94" + b"".join(key + make + b"\x94" + put + get(number) for number in range(1, 700))
    with pytest.raises(SerializationError, match="more than 600 deep"):
        hostile.parcel(hostile.whole(head)).open(ALLOW)


def get(number: int) -> bytes:
    """Take the place of the object on the stack by one of the memo."""
    return b"0j" + number.to_bytes(4, "little")


@contextmanager
def recursion_limit(limit: int) -> Iterator[None]:
    before = sys.getrecursionlimit()
    sys.setrecursionlimit(limit)
    yield
    sys.setrecursionlimit(before)
