"""The serializer: what comes back, and that nothing but its own error comes of damaged bytes."""

from __future__ import annotations

import pickle
import struct
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strangers import Stranger
from torch import Tensor, nn

import torchfedrpc as tfr
from torchfedrpc.errors import SerializationError, UntrustedTypeError
from torchfedrpc.wire import serializer
from torchfedrpc.wire.allowlist import AllowList
from torchfedrpc.wire.packing import Parcel, pack

pytestmark = [
    pytest.mark.filterwarnings(r"ignore:Sparse \w+ tensor support is in beta state"),
    pytest.mark.filterwarnings("ignore:Sparse invariant checks are implicitly disabled"),
    pytest.mark.filterwarnings("ignore:torch.quantize_per_:"),
    pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated:DeprecationWarning"),
]

serialize, deserialize = tfr.ParameterSerializer.serialize, tfr.ParameterSerializer.deserialize

DTYPES = [
    torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.float8_e4m3fn, torch.float8_e5m2,
    torch.complex64, torch.complex128, torch.bool,
    torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8, torch.uint16, torch.uint32, torch.uint64,
]  # fmt: skip


def bits(tensor: Tensor) -> list[int]:
    plain = tensor.detach().clone(memory_format=torch.contiguous_format)
    return plain.flatten().view(torch.uint8).tolist()


def assert_same(received: Tensor, tensor: Tensor) -> None:
    assert type(received) is type(tensor)
    assert received.dtype is tensor.dtype
    assert received.shape == tensor.shape
    assert received.requires_grad is tensor.requires_grad
    assert bits(received) == bits(tensor)


@st.composite
def tensors(draw: st.DrawFn) -> Tensor:
    """A dense tensor of any dtype, shape and strides: permuted, sliced, stepped, expanded, a Parameter or not."""
    dtype = draw(st.sampled_from(DTYPES))
    shape = draw(st.lists(st.integers(0, 4), max_size=4))
    num_bytes = torch.Size(shape).numel() * dtype.itemsize
    top = 1 if dtype is torch.bool else 255
    raw = draw(st.lists(st.integers(0, top), min_size=num_bytes, max_size=num_bytes))
    tensor = torch.tensor(raw, dtype=torch.uint8).view(dtype).view(shape)
    if shape:
        tensor = tensor.permute(draw(st.permutations(range(len(shape)))))
        dim = draw(st.integers(0, len(shape) - 1))
        size = tensor.shape[dim]
        start = draw(st.integers(0, size))
        tensor = tensor.narrow(dim, start, draw(st.integers(0, size - start)))
        if draw(st.booleans()):
            step = draw(st.integers(1, 3))
            tensor = tensor[(slice(None),) * dim + (slice(None, None, step),)]
        if draw(st.booleans()):
            tensor = tensor.unsqueeze(dim).expand(*tensor.shape[:dim], 2, *tensor.shape[dim:])
    if dtype.is_floating_point or dtype.is_complex:
        kind = draw(st.sampled_from(["plain", "grad", "parameter"]))
        if kind == "grad":
            return tensor.detach().requires_grad_()
        if kind == "parameter":
            return nn.Parameter(tensor)
    return tensor


@settings(max_examples=150, deadline=None)
@given(st.lists(tensors(), max_size=3))
def test_any_dense_tensors_come_back(values: list[Tensor]) -> None:
    for received, tensor in zip(deserialize(serialize(values)), values, strict=True):
        assert_same(received, tensor)


@settings(max_examples=100, deadline=None)
@given(tensors(), st.data())
def test_any_two_views_of_a_tensor_stay_tied_or_share_nothing(base: Tensor, data: st.DataObject) -> None:
    base = base.detach()
    views = []
    for _ in range(2):
        view = base
        for dim, size in enumerate(base.shape):
            start = data.draw(st.integers(0, size))
            view = view.narrow(dim, start, data.draw(st.integers(0, size - start)))
        views.append(view)
    received = deserialize(serialize([base, *views]))
    for other, tensor in zip(received, [base, *views], strict=True):
        assert_same(other, tensor)
        if tensor.numel():
            assert other.untyped_storage().data_ptr() == received[0].untyped_storage().data_ptr()


plain = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text()
    | st.binary()
    | st.complex_numbers(allow_nan=False),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text(max_size=5), inner, max_size=3)
        | st.tuples(inner, inner)
        | st.frozensets(st.integers(), max_size=3)
    ),
    max_leaves=10,
)


@settings(max_examples=100, deadline=None)
@given(plain)
def test_any_plain_data_comes_back(obj: Any) -> None:
    received = deserialize(serialize(obj))
    assert received == obj
    assert type(received) is type(obj)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_arrays_of_numpy_come_back_beside_tensors_of_every_dtype(dtype: torch.dtype) -> None:
    tensor, array = torch.zeros(3, dtype=dtype), np.arange(3000.0)
    received_array, received = deserialize(serialize([array, tensor]))
    assert np.array_equal(received_array, array)
    assert_same(received, tensor)


@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.eye(3).to_sparse(),
        lambda: torch.eye(4).to_sparse_csr(),
        lambda: torch.eye(4).to_sparse_csc(),
        lambda: torch.eye(4).to_sparse_bsr((2, 2)),
        lambda: torch.quantize_per_tensor(torch.arange(4.0), 0.5, 1, torch.qint8),
        lambda: torch.quantize_per_channel(torch.ones(2, 2), torch.ones(2), torch.tensor([0, 1]), 0, torch.qint8),
        lambda: torch.tensor([1 + 2j]).conj(),
        lambda: torch.tensor([1 + 2j]).conj().imag,
        lambda: torch._neg_view(torch.tensor([1.0, 2.0])),
        lambda: torch._efficientzerotensor((3,)),
        lambda: torch.ones(2, 3, 4, 5).to(memory_format=torch.channels_last),
    ],
    ids=["coo", "csr", "csc", "bsr", "per_tensor", "per_channel", "conj", "imag", "neg", "zero", "channels_last"],
)
def test_special_tensors_come_back(make: Callable[[], Tensor]) -> None:
    tensor = make()
    received = deserialize(serialize({"w": tensor}))["w"]
    assert received.layout is tensor.layout
    assert received.dtype is tensor.dtype
    dense, expected = (
        value.dequantize() if value.is_quantized else value.to_dense() if value.layout is not torch.strided else value
        for value in (received, tensor)
    )
    assert torch.equal(dense, expected)
    assert dense.stride() == expected.stride()


def test_what_comes_back_can_be_written_and_is_apart_from_the_bytes() -> None:
    data = bytearray(serialize([torch.zeros(4), np.zeros(3000)]))
    before = bytes(data)
    weights, array = deserialize(data)
    weights.fill_(1)
    array.fill(1)
    assert data == before
    data[:] = bytes(len(data))
    assert weights.tolist() == [1, 1, 1, 1]


@pytest.mark.parametrize("wrap", [bytes, bytearray, memoryview])
def test_any_kind_of_buffer_is_read(wrap: Callable[[bytes], Any]) -> None:
    assert deserialize(wrap(serialize([torch.ones(1)])))[0].tolist() == [1]


def test_serializing_leaves_the_object_as_it_is() -> None:
    model = nn.Linear(2, 2)
    pointers = [parameter.data_ptr() for parameter in model.parameters()]
    serialize(model)
    assert [parameter.data_ptr() for parameter in model.parameters()] == pointers
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_the_bytes_are_those_of_the_values_and_little_more() -> None:
    weights = torch.zeros(1000, 1000)[:10]
    assert len(serialize({"a": weights, "b": weights})) < weights.nbytes + 1000


def test_equal_objects_give_equal_bytes() -> None:
    first = {"a": torch.arange(5.0), "b": np.arange(3000)}
    second = {"a": torch.arange(5.0), "b": np.arange(3000)}
    assert serialize(first) == serialize(second)


def test_tensors_start_on_aligned_addresses_of_the_bytes() -> None:
    marks = [torch.full((3,), 1.25), torch.full((5,), 2.5)]
    data = serialize(["x", *marks])
    for mark in marks:
        assert data.index(bytes(bits(mark))) % 64 == 0


# Devices.


def test_the_device_of_the_tensors_can_be_given() -> None:
    received = deserialize(serialize([torch.ones(2), nn.Parameter(torch.ones(2)), torch.arange(3)]), device="meta")
    assert [value.device.type for value in received] == ["meta"] * 3
    assert type(received[1]) is nn.Parameter
    assert received[1].requires_grad
    assert received[2].dtype is torch.int64


def test_ties_survive_a_move_to_a_device() -> None:
    base = torch.arange(6.0)
    first, second = deserialize(serialize([base[:4], base[2:]]), torch.device("cpu"))
    first[3] = 9
    assert second.tolist() == [2, 9, 4, 5]


def test_arrays_of_numpy_stay_in_host_memory_whatever_the_device() -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    array, weights = deserialize(serialize([np.arange(3000), torch.ones(2)]), device=device)
    assert array.tolist() == list(range(3000))
    assert weights.device.type == device


@pytest.mark.parametrize("device", ["nowhere", "cuda:99", [3]])
def test_a_device_that_is_not_there_is_an_error_of_ours(device: Any) -> None:
    with pytest.raises(SerializationError):
        deserialize(serialize(torch.ones(2)), device=device)


# Trust.


def test_a_type_of_ones_own_needs_its_package_named() -> None:
    data = serialize({"deep": [Stranger()]})
    with pytest.raises(UntrustedTypeError, match=r"strangers\.Stranger .*trusted_modules=\[strangers\]"):
        deserialize(data)
    received = deserialize(data, trusted_modules=["strangers"])
    assert type(received["deep"][0]) is Stranger


class Runs:
    def __reduce__(self) -> Any:
        return print, ("this must not run",)


def test_a_pickle_that_would_run_something_does_not(capsys: pytest.CaptureFixture[str]) -> None:
    data = serialize([torch.ones(1), Runs()])
    with pytest.raises(UntrustedTypeError, match=r"builtins\.print"):
        deserialize(data, trusted_modules=[__name__])
    assert capsys.readouterr().out == ""


def of_tuples(depth: int) -> Any:
    """A tuple whose hash takes 2**depth steps."""
    nested: Any = ()
    for _ in range(depth):
        nested = nested, nested
    return nested


MANY = range(1 << 40)
NONE = np.zeros((1 << 40, 0))


@pytest.mark.parametrize("layouts", [torch.float32, AllowList, print, Runs(), MANY, NONE])
def test_the_table_lists_how_tensors_lie(layouts: Any, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SerializationError):
        deserialize(forged(table=pickle.dumps(([], layouts))))
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    "views",
    [MANY, NONE, [MANY], [NONE], [(MANY, (1,))], [(of_tuples(60), (1,))], {}, [()]],
    ids=["range", "array", "range as view", "array as view", "range as slot", "tuples as slot", "dict", "empty view"],
)
def test_the_table_has_views_of_plain_numbers(views: Any) -> None:
    with pytest.raises(SerializationError):
        deserialize(forged(table=pickle.dumps((views, [])), head=pickle.dumps({1})))


# Damage.


@pytest.fixture(scope="module")
def data() -> bytes:
    """Bytes with every kind of part, whose pickle holds no long strings."""
    base = torch.arange(4.0)
    obj = {
        "w": nn.Parameter(torch.ones(2, 2)),
        "ties": [base[:3], base[1:]],
        "coo": torch.eye(2).to_sparse(),
        "array": np.arange(2000.0),
        "n": [1, "a", 2.5, None, (3,)],
    }
    return serialize(obj)


def prefix(data: bytes) -> tuple[int, int, int]:
    """The lengths of prefix, table and head."""
    _, _, table_bytes, head_bytes = struct.unpack_from("<4sIQQ", data)
    return struct.calcsize("<4sIQQ"), table_bytes, head_bytes


def forged(table: bytes, head: bytes = b"\x80\x05N.", tail: bytes = b"") -> bytes:
    """Well-formed bytes with that table, head, and memory after them."""
    checksum = zlib.crc32(table + head)
    body = struct.pack("<4sIQQ", b"TFR\x03", checksum, len(table), len(head)) + table + head
    return body + bytes(-len(body) % 64) + tail


def test_the_forged_bytes_of_these_tests_are_well_formed() -> None:
    assert deserialize(forged(pickle.dumps(([], [])))) is None


def test_cut_anywhere_it_is_an_error_of_ours(data: bytes) -> None:
    size, table_bytes, head_bytes = prefix(data)
    outside_buffers = range(size + table_bytes + head_bytes + 64)
    for length in [*outside_buffers, len(data) - 1, len(data) // 2]:
        with pytest.raises(SerializationError):
            deserialize(data[:length])


@pytest.mark.parametrize("change", [0x01, 0x80, 0xFF])
@pytest.mark.parametrize("part", ["prefix", "table", "head"])
def test_a_changed_byte_is_an_error_of_ours(data: bytes, part: str, change: int) -> None:
    size, table_bytes, head_bytes = prefix(data)
    ends = {"prefix": (0, size), "table": (size, size + table_bytes)}
    ends["head"] = (size + table_bytes, size + table_bytes + head_bytes)
    for position in range(*ends[part]):
        changed = bytearray(data)
        changed[position] ^= change
        with pytest.raises(SerializationError):
            deserialize(changed)


@pytest.mark.parametrize("part", ["table", "head"])
def test_a_changed_byte_of_the_pickles_is_always_noticed(part: str) -> None:
    data = serialize({"learning_rate": 0.5, "weights": torch.ones(2)})
    size, table_bytes, _ = prefix(data)
    changed = bytearray(data)
    if part == "head":
        changed[data.index(b"learning_rate", size + table_bytes)] ^= 0x01
    else:
        changed[data.index(b"float32", size) + 5 : data.index(b"float32", size) + 7] = b"16"
    with pytest.raises(SerializationError):
        deserialize(changed)


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=200), st.sampled_from([b"", b"TFR\x03", b"TFR\x03\0\0\0\0"]))
def test_foreign_bytes_are_an_error_of_ours(noise: bytes, start: bytes) -> None:
    with pytest.raises(SerializationError):
        deserialize(start + noise)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"TFR\x03",
        b"TFR\x02" + bytes(100),
        bytes(100),
        pickle.dumps({"a": 1}),
        b"PK\x03\x04" + bytes(100),
        struct.pack("<4sIQQ", b"TFR\x03", 0, 2**63, 2**63),
        struct.pack("<4sIQQ", b"TFR\x03", 0, 2**64 - 1, 1),
    ],
    ids=["nothing", "magic", "version", "zeros", "pickle", "zip", "huge", "wrapping"],
)
def test_bytes_of_another_format_are_told_to_be(data: bytes) -> None:
    with pytest.raises(SerializationError, match="these bytes are"):
        deserialize(data)


@pytest.mark.parametrize("position", range(4))
def test_bytes_of_another_version_are_told_to_be(data: bytes, position: int) -> None:
    changed = bytearray(data)
    changed[position] += 1
    with pytest.raises(SerializationError, match="of this version"):
        deserialize(changed)


@pytest.mark.parametrize("data", ["text", None, 3, [1]])
def test_what_is_no_bytes_is_an_error_of_ours(data: Any) -> None:
    with pytest.raises(SerializationError):
        deserialize(data)


@pytest.mark.parametrize(
    "layout",
    [
        ("float32", (1000,), (1,), 16),
        ("float32", (1 << 40,), (1,), 16),
        ("float32", (4,), (1 << 60,), 16),
        ("float32", (-4,), (1,), 16),
        ("float32", (4,), (-1,), 16),
        ("float32", (4,), (1,), 8),
        ("float32", (4,), (1,), -1),
        ("float32", (4,), (1,), 1 << 40),
        ("float64", (4,), (1,), 16),
        ("system", (4,), (1,), 16),
        ("Tensor", (4,), (1,), 16),
        ("float32", "shape", (1,), 16),
        ("float32", (4,), 16),
        None,
    ],
    ids=str,
)
def test_a_table_that_lies_about_memory_is_an_error_of_ours(layout: Any) -> None:
    _, table_bytes, head_bytes = prefix(honest := serialize(torch.ones(4)))
    head = honest[24 + table_bytes :][:head_bytes]
    assert (
        deserialize(forged(pickle.dumps(([0], [("float32", (4,), (1,), 16, False)])), head, bytes(16))).tolist()
        == [0] * 4
    )
    with pytest.raises(SerializationError):
        deserialize(forged(pickle.dumps(([0], [layout])), head, bytes(16)))


@pytest.mark.parametrize("views", [[], [1], [-2], [(0, "float32", (9,), (1,), 0)], ["0"], None], ids=str)
def test_a_table_that_lies_about_views_is_an_error_of_ours(views: Any) -> None:
    _, table_bytes, head_bytes = prefix(honest := serialize(torch.ones(4)))
    head = honest[24 + table_bytes :][:head_bytes]
    with pytest.raises(SerializationError):
        deserialize(forged(pickle.dumps((views, [("float32", (4,), (1,), 16, False)])), head, bytes(16)))


def test_damaged_sparse_indices_do_not_reach_other_memory() -> None:
    tensor = torch.sparse_coo_tensor(torch.tensor([[1], [1]]), torch.tensor([1.0]), (2, 2), check_invariants=True)
    data = bytearray(serialize(tensor))
    data[data.rindex((1).to_bytes(8, "little")) + 2] = 0x7F
    with pytest.raises(SerializationError):
        deserialize(data)


def test_serializing_leaves_a_storage_resizable_and_gives_one_that_is() -> None:
    live = torch.arange(4.0)
    received = tfr.ParameterSerializer.deserialize(tfr.ParameterSerializer.serialize([live, np.arange(2000.0)]))
    live.resize_(8)
    received[0].resize_(16)
    received[1].resize(4000, refcheck=False)
    assert received[0][:4].tolist() == [0, 1, 2, 3]


def test_tensors_of_a_gpu_go_where_the_reader_says() -> None:
    parcel = pack([torch.ones(3), torch.ones(2, 2, dtype=torch.int8)[:, 0]])
    on_gpu = [slot.dtype is torch.float32 for slot in parcel.slots]
    chunks = serializer.chunks_of(parcel)
    views, layouts = pickle.loads(chunks[1])
    layouts = [(*layout[:-1], was) for layout, was in zip(layouts, on_gpu, strict=True)]
    table = pickle.dumps((views, layouts), protocol=5)
    prefix = serializer._PREFIX.pack(
        serializer._MAGIC, serializer._checksum(table, parcel.head), len(table), len(parcel.head)
    )
    assert len(table) == len(chunks[1])  # what follows is aligned as before
    data = b"".join([prefix, table, *chunks[2:]])
    there, here = serializer.read(data, gpu=torch.device("meta")).open(AllowList())
    assert (there.device.type, here.device.type) == ("meta", "cpu")
    assert serializer.read(data).open(AllowList())[0].tolist() == [1, 1, 1]
    assert serializer.read(data, device="cpu", gpu=torch.device("meta")).open(AllowList())[0].device.type == "cpu"


@pytest.mark.parametrize(
    "shape", [((1,) * 100_000, 10**6), ([0], 10**9), ("a" * 1000, 10**9)], ids=["tuple", "list", "text"]
)
def test_a_shape_that_is_no_shape_takes_no_memory(shape: Any) -> None:
    forged: list[list[Any]] = [[(0, "float32", shape, (1, 1), 0)], [(0, shape), (0, shape)]]
    for views in forged:
        head = pack([torch.zeros(4)]).head
        with pytest.raises(SerializationError):
            Parcel(head, views, [torch.zeros(4)]).open(AllowList())
