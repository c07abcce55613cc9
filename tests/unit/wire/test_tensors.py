"""Tensors as plain dense ones: which layouts come back, what is refused, and what memory is sent."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from torchfedrpc.errors import SerializationError
from torchfedrpc.wire.allowlist import AllowList
from torchfedrpc.wire.packing import pack
from torchfedrpc.wire.tensors import (
    ALIGNMENT_BYTES,
    check_can_travel,
    gather_slots,
    lay_out,
    restore_special,
    take_apart,
)

pytestmark = [
    pytest.mark.filterwarnings(r"ignore:Sparse \w+ tensor support is in beta state"),
    pytest.mark.filterwarnings("ignore:Sparse invariant checks are implicitly disabled"),
    pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental"),
    pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage"),
    pytest.mark.filterwarnings("ignore:torch.quantize_per_:"),
    pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated:DeprecationWarning"),
]

FLOAT8 = [getattr(torch, name) for name in dir(torch) if name.startswith("float8_")]
DTYPES = [
    torch.float16, torch.bfloat16, torch.float32, torch.float64, *FLOAT8,
    torch.complex32, torch.complex64, torch.complex128,
    torch.bool, torch.int8, torch.int16, torch.int32, torch.int64,
    torch.uint8, torch.uint16, torch.uint32, torch.uint64,
]  # fmt: skip


def filled(dtype: torch.dtype, *shape: int) -> Tensor:
    """A tensor whose bytes differ from each other."""
    count = torch.Size(shape).numel()
    if dtype is torch.bool:
        return (torch.arange(count) % 3 == 0).view(shape)
    return (torch.arange(count * dtype.itemsize) % 251).to(torch.uint8).view(dtype).view(shape)


def bits(tensor: Tensor) -> list[int]:
    """A dense tensor's elements as bytes, whatever their dtype: NaNs count by their bits."""
    plain = tensor.detach().resolve_conj().resolve_neg().contiguous()
    return plain.reshape(-1).view(torch.uint8).tolist() if plain.numel() else []


def sent(*tensors: Tensor, copy: bool = True) -> tuple[list[Tensor], int]:
    """The tensors as they come out of their slots, and the bytes of the slots."""
    views, slots = gather_slots(list(tensors), copy=copy, join=copy)
    if not copy:  # such slots are for a reader that copies their memory
        slots = [slot.clone() for slot in slots]
    return lay_out(views, slots), sum(slot.nbytes for slot in slots)


def assert_same(received: Tensor, tensor: Tensor) -> None:
    assert received.dtype is tensor.dtype
    assert received.shape == tensor.shape
    assert bits(received) == bits(tensor)


# A tensor alone.


@pytest.mark.parametrize("copy", [True, False], ids=["copied", "aliased"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
class TestEveryDtype:
    @pytest.mark.parametrize("shape", [(), (0,), (5,), (2, 3), (2, 0, 3), (1, 1)], ids=str)
    def test_comes_back_in_every_shape(self, dtype: torch.dtype, copy: bool, shape: tuple[int, ...]) -> None:
        tensor = filled(dtype, *shape)
        (received,), _ = sent(tensor, copy=copy)
        assert_same(received, tensor)
        assert received.stride() == tensor.stride()

    def test_comes_back_as_two_ties(self, dtype: torch.dtype, copy: bool) -> None:
        whole = filled(dtype, 4, 4)
        received, num_bytes = sent(whole, whole[1:3, 1:3].T, copy=copy)
        assert_same(received[0], whole)
        assert_same(received[1], whole[1:3, 1:3].T)
        assert received[1].stride() == (1, 4)
        assert num_bytes == whole.nbytes


@pytest.mark.parametrize(
    "make",
    [
        lambda: filled(torch.float32, 2, 3).T,
        lambda: filled(torch.float32, 2, 3, 4).permute(2, 0, 1),
        lambda: filled(torch.float32, 2, 3, 4, 5).to(memory_format=torch.channels_last),
        lambda: filled(torch.float32, 2, 3, 4, 5, 6).to(memory_format=torch.channels_last_3d),
        lambda: filled(torch.float32, 0, 3).T,
        lambda: filled(torch.float32, 1, 5, 1).transpose(0, 2),
    ],
    ids=["transposed", "permuted", "channels_last", "channels_last_3d", "empty", "size_one"],
)
@pytest.mark.parametrize("copy", [True, False], ids=["copied", "aliased"])
def test_strides_without_gaps_are_kept(make: Callable[[], Tensor], copy: bool) -> None:
    tensor = make()
    (received,), num_bytes = sent(tensor, copy=copy)
    assert_same(received, tensor)
    assert received.stride() == tensor.stride()
    assert num_bytes == tensor.nbytes


@pytest.mark.parametrize(
    "make",
    [
        lambda: filled(torch.float32, 1000)[::7],
        lambda: filled(torch.float32, 40, 40)[3:5, 7:9],
        lambda: filled(torch.float32, 3, 1).expand(3, 5),
        lambda: filled(torch.float32, 1).expand(2, 3),
        lambda: filled(torch.float32, 9).as_strided((3, 4), (1, 2)),
        lambda: filled(torch.float32, 1000)[500:503],
    ],
    ids=["stepped", "block", "expanded", "broadcast", "overlapping_itself", "slice"],
)
@pytest.mark.parametrize("copy", [True, False], ids=["copied", "aliased"])
def test_a_view_with_gaps_is_sent_without_them(make: Callable[[], Tensor], copy: bool) -> None:
    tensor = make()
    (received,), num_bytes = sent(tensor, copy=copy)
    assert_same(received, tensor)
    assert received.stride() == tensor.stride()
    assert received.data_ptr() % ALIGNMENT_BYTES == tensor.storage_offset() * tensor.itemsize % ALIGNMENT_BYTES
    assert num_bytes < tensor.nbytes + ALIGNMENT_BYTES


def test_a_copy_is_memory_of_its_own() -> None:
    tensor = torch.zeros(4)
    (received,), _ = sent(tensor)
    tensor.fill_(7)
    assert received.tolist() == [0, 0, 0, 0]
    received.fill_(5)
    assert tensor.tolist() == [7, 7, 7, 7]


def test_without_a_copy_a_whole_storage_is_taken_as_it_is() -> None:
    tensor = torch.zeros(4)
    _, (slot,) = gather_slots([tensor], copy=False, join=True)
    assert slot.data_ptr() == tensor.data_ptr()


@pytest.mark.parametrize("copy", [True, False], ids=["copied", "aliased"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_small_tensors_of_every_dtype_come_back_from_one_slot(dtype: torch.dtype, copy: bool) -> None:
    tensors = [filled(dtype, *shape) for shape in [(5,), (2, 3), (), (1, 1), (7, 1, 3)]]
    views, slots = gather_slots(tensors, copy=copy, join=True)
    assert len(slots) == 1
    for received, tensor in zip(lay_out(views, slots), tensors, strict=True):
        assert_same(received, tensor)
        assert received.stride() == tensor.stride()


@pytest.mark.parametrize("join", [True, False])
def test_slots_are_laid_out_alike_with_a_copy_and_without(join: bool) -> None:
    base = torch.arange(10.0)
    tensors = [base[:4], base[4:], torch.ones(3), torch.ones(2, 2).t(), torch.ones(5), torch.ones(99_999)]
    views, slots = gather_slots(tensors, copy=True, join=join)
    other_views, other_slots = gather_slots(tensors, copy=False, join=join)
    assert other_views == views
    assert [slot.shape for slot in other_slots] == [slot.shape for slot in slots]
    assert len(slots) == (4 if join else 5)


# Tensors tied by a common storage.


def share_memory(first: Tensor, second: Tensor) -> bool:
    return first.untyped_storage().data_ptr() == second.untyped_storage().data_ptr()


BASE = 100_000  # elements of a large storage


@pytest.mark.parametrize(
    "make",
    [
        lambda base: [base, base],
        lambda base: [base[:10], base[5:15]],
        lambda base: [base[:10], base[10:20]],
        lambda base: [base[10:20], base[:10]],
        lambda base: [base[:10], base[20:30], base[5:25]],
        lambda base: [base[:20], base[:20].view(4, 5).T],
        lambda base: [base[4:8], base[4:8].view(torch.int32)],
        lambda base: [base[0], base[:3]],
        lambda base: [base[17:19], base[18:20].view(torch.uint8)],
        lambda base: [base[8:16:2], base[9:17:2]],
    ],
    ids=["equal", "overlapping", "adjoining", "adjoining_backwards", "bridged", "transposed", "other_dtype", "0d",
         "other_itemsize", "interleaved"],
)  # fmt: skip
@pytest.mark.parametrize("copy", [True, False], ids=["copied", "aliased"])
def test_views_that_touch_stay_tied(make: Callable[[Tensor], list[Tensor]], copy: bool) -> None:
    tensors = make(torch.arange(float(BASE)))
    received, _ = sent(*tensors, copy=copy)
    for tensor, other in zip(tensors, received, strict=True):
        assert_same(other, tensor)
        assert other.stride() == tensor.stride()
        assert share_memory(other, received[0])


def test_a_change_of_one_tie_shows_in_the_other_at_the_same_place() -> None:
    base = torch.zeros(10)
    (first, second), _ = sent(base[:6], base[4:])
    first[5] = 3
    assert second.tolist() == [0, 3, 0, 0, 0, 0]
    assert base.tolist() == [0] * 10


@pytest.mark.parametrize("copy", [True, False], ids=["copied", "aliased"])
@pytest.mark.parametrize("count", [2, 5])
def test_views_far_apart_on_a_large_storage_do_not_send_it(count: int, copy: bool) -> None:
    base = torch.arange(float(BASE))
    starts = range(0, BASE, BASE // count)
    tensors = [base[start + 3 : start + 8] for start in starts]
    received, num_bytes = sent(*tensors, copy=copy)
    for tensor, other in zip(tensors, received, strict=True):
        assert_same(other, tensor)
    assert num_bytes < count * (5 * 4 + 64)  # a view may take up to an alignment more
    assert not share_memory(received[0], received[1])


def test_a_view_and_two_ties_on_one_storage_send_two_stretches() -> None:
    base = torch.arange(float(BASE))
    received, num_bytes = sent(base[-4:], base[:4], base[2:6])
    assert [part.tolist() for part in received] == [
        [BASE - 4, BASE - 3, BASE - 2, BASE - 1],
        [0, 1, 2, 3],
        [2, 3, 4, 5],
    ]
    assert share_memory(received[1], received[2])
    assert num_bytes < 256


def test_a_tie_keeps_its_alignment() -> None:
    base = torch.arange(float(BASE))
    tensors = [base[35:45], base[40:50]]
    received, _ = sent(*tensors)
    for tensor, other in zip(tensors, received, strict=True):
        assert other.data_ptr() % 64 == tensor.data_ptr() % 64


def test_tensors_of_different_storages_are_not_tied() -> None:
    (first, second), _ = sent(torch.zeros(3), torch.zeros(3))
    first.fill_(1)
    assert second.tolist() == [0, 0, 0]


def test_empty_views_send_nothing_of_their_storage() -> None:
    base = torch.arange(float(BASE))
    received, num_bytes = sent(base[:0], base[5:5].view(0, 1), base[:2])
    assert [tuple(part.shape) for part in received] == [(0,), (0, 1), (2,)]
    assert num_bytes == 8


@pytest.mark.parametrize("copy", [True, False], ids=["copied", "aliased"])
@pytest.mark.parametrize("num_views", [1, 2])
@pytest.mark.parametrize("left_bytes", [0, 8], ids=["freed", "shrunk"])
def test_a_view_of_a_freed_storage_is_refused(copy: bool, num_views: int, left_bytes: int) -> None:
    base = torch.ones(10)
    views = [base[:4], base[4:8]][:num_views]
    base.untyped_storage().resize_(left_bytes)
    with pytest.raises(SerializationError, match="storage of this tensor was freed or resized"):
        gather_slots(views, copy=copy, join=True)


# Views as they arrive: what is wrong with them is an error of ours where their parcel is opened.


def opened(views: list[Any], slots: list[Tensor]) -> Any:
    """A list of tensors that has arrived with these views and slots."""
    return dataclasses.replace(pack([torch.zeros(1) for _ in views]), views=views, slots=slots).open(AllowList())


def test_views_that_fit_their_slots_are_opened() -> None:
    assert opened([(0, "float32", (2,), (2,), 1)], [torch.arange(4.0).view(torch.uint8)])[0].tolist() == [1, 3]
    assert [one.tolist() for one in opened([(0, (1,)), (0, (2,))], [torch.arange(3.0)])] == [[0], [1, 2]]


@pytest.mark.parametrize(
    "view",
    [
        (0, "float32", (4,), (1,), -1),
        (0, "float32", (2,), (-1,), 1),
        (0, "float32", (-2,), (1,), 0),
        (0, "float32", (4,), (1 << 61,), 0),
        (0, "float32", (2, 2), (1,), 0),
        (1, "float32", (4,), (1,), 0),
        3,
    ],
    ids=str,
)
def test_a_view_that_cannot_be_gives_an_error(view: Any) -> None:
    with pytest.raises(SerializationError):
        opened([view], [torch.zeros(16, dtype=torch.uint8)])


@pytest.mark.parametrize(
    "view",
    [
        (0, "float32", (5,), (1,), 0),
        (0, "float32", (4,), (1,), 1),
        (0, "float64", (4,), (1,), 0),
        (0, "float32", (2,), (4,), 0),
    ],
    ids=str,
)
def test_a_view_beyond_its_slot_shows_no_other_memory(view: Any) -> None:
    with pytest.raises(SerializationError):
        opened([view], [torch.zeros(16, dtype=torch.uint8)])


@pytest.mark.parametrize(
    "shapes",
    [
        [(4,)],
        [(2,), (2,)],
        [(-1,), (4,)],
        [(-1, -3)],
        [(3, -1), (6,)],
        [(0, -1), (3,)],
        [(1.5,), (1.5,)],
        ["abc"],
        [None],
        [()],
    ],
    ids=str,
)
def test_small_tensors_that_do_not_fill_their_slot_give_an_error(shapes: list[Any]) -> None:
    with pytest.raises(SerializationError):
        opened([(0, shape) for shape in shapes], [torch.zeros(3)])


@pytest.mark.parametrize("number", [1, -2, None, 0.5, "0", []], ids=str)
def test_small_tensors_of_no_slot_give_an_error(number: Any) -> None:
    with pytest.raises(SerializationError):
        opened([(number, (3,))], [torch.zeros(3)])


@pytest.mark.parametrize("name", ["system", "load", "Tensor", "float99", ""])
def test_a_view_of_no_dtype_is_refused(name: str) -> None:
    with pytest.raises(SerializationError, match="unknown dtype"):
        opened([(0, name, (1,), (1,), 0)], [torch.zeros(4)])


# Special layouts.


def through_parts(tensor: Tensor) -> Tensor:
    parts = take_apart(tensor)
    assert parts is not None
    assert all(take_apart(part) is None for part in parts if isinstance(part, Tensor))
    return restore_special(*parts)


def coordinates(indices: list[list[int]], values: Tensor, shape: tuple[int, ...]) -> Tensor:
    return torch.sparse_coo_tensor(torch.tensor(indices), values, shape, check_invariants=True)


COO = coordinates([[2, 0, 0], [1, 3, 3]], torch.tensor([1.0, 2.0, 3.0]), (3, 4))
HYBRID = coordinates([[2, 0]], torch.arange(6.0).view(2, 3), (4, 3))
EMPTY = torch.sparse_coo_tensor(torch.empty(2, 0, dtype=torch.int64), torch.ones(0), (2, 3), check_invariants=True)


@pytest.mark.parametrize(
    "tensor",
    [COO, COO.coalesce(), HYBRID, COO.to(torch.bfloat16), EMPTY, COO.to(torch.bool)],
    ids=["uncoalesced", "coalesced", "hybrid", "bfloat16", "empty", "bool"],
)
def test_a_coordinate_tensor_is_put_together(tensor: Tensor) -> None:
    received = through_parts(tensor)
    assert received.layout is torch.sparse_coo
    assert received.is_coalesced() is tensor.is_coalesced()
    assert torch.equal(received._indices(), tensor._indices())
    assert_same(received._values(), tensor._values())
    assert received.shape == tensor.shape


@pytest.mark.parametrize("layout", [torch.sparse_csr, torch.sparse_csc, torch.sparse_bsr, torch.sparse_bsc], ids=str)
@pytest.mark.parametrize("shape", [(4, 6), (2, 4, 6)], ids=["matrix", "batch"])
def test_a_compressed_tensor_is_put_together(layout: torch.layout, shape: tuple[int, ...]) -> None:
    dense = torch.zeros(shape)
    dense[..., 1, 2] = 5.0
    dense[..., 3, 4] = 6.0
    blocksize = (2, 3) if layout in (torch.sparse_bsr, torch.sparse_bsc) else None
    tensor = dense.to_sparse(layout=layout, blocksize=blocksize)
    received = through_parts(tensor)
    assert received.layout is layout
    assert received.shape == tensor.shape
    assert_same(received.values(), tensor.values())
    assert torch.equal(received.to_dense(), dense)


@pytest.mark.parametrize("dtype", [torch.qint8, torch.quint8, torch.qint32], ids=str)
@pytest.mark.parametrize("transposed", [False, True])
def test_a_tensor_quantised_as_a_whole_is_put_together(dtype: torch.dtype, transposed: bool) -> None:
    tensor = torch.quantize_per_tensor(torch.arange(6.0).view(2, 3), 0.5, 3, dtype)
    tensor = tensor.T if transposed else tensor
    received = through_parts(tensor)
    assert received.dtype is dtype
    assert (received.q_scale(), received.q_zero_point()) == (0.5, 3)
    assert torch.equal(received.int_repr(), tensor.int_repr())


@pytest.mark.parametrize("axis", [0, 1])
def test_a_tensor_quantised_by_channel_is_put_together(axis: int) -> None:
    scales, zero_points = torch.tensor([0.5, 0.25]), torch.tensor([1, 2])
    tensor = torch.quantize_per_channel(torch.arange(4.0).view(2, 2), scales, zero_points, axis, torch.quint8)
    received = through_parts(tensor)
    assert received.q_per_channel_axis() == axis
    assert received.q_per_channel_scales().tolist() == [0.5, 0.25]
    assert received.q_per_channel_zero_points().tolist() == [1, 2]
    assert torch.equal(received.int_repr(), tensor.int_repr())


def test_another_quantisation_is_refused_with_its_remedy() -> None:
    tensor = torch.quantize_per_channel(
        torch.ones(2, 2), torch.tensor([0.5, 0.25]), torch.tensor([0.0, 1.0]), 0, torch.quint8
    )
    with pytest.raises(SerializationError, match=r"send tensor\.dequantize\(\)"):
        take_apart(tensor)


@pytest.mark.parametrize("tensor", [torch.ones(3), torch.ones(3).to(torch.bfloat16), torch.tensor(1)])
def test_a_dense_tensor_is_not_taken_apart(tensor: Tensor) -> None:
    assert take_apart(tensor) is None


@pytest.mark.parametrize(
    "parts",
    [
        ("sparse_coo", torch.tensor([[5]]), torch.ones(1), (3,), True),
        ("sparse_coo", torch.tensor([[-1]]), torch.ones(1), (3,), False),
        ("sparse_compressed", torch.tensor([0, 1]), torch.tensor([7]), torch.ones(1), (1, 3), torch.sparse_csr),
        ("sparse_compressed", torch.tensor([0, 9]), torch.tensor([0]), torch.ones(1), (1, 3), torch.sparse_csr),
    ],
    ids=["coordinate", "negative", "column", "row_pointer"],
)
def test_sparse_indices_outside_the_shape_are_refused(parts: Any) -> None:
    with pytest.raises(RuntimeError):
        restore_special(*parts)


def test_an_unknown_kind_of_tensor_is_refused() -> None:
    with pytest.raises(SerializationError, match="unknown kind of tensor"):
        restore_special("xyz")


# What cannot travel.


def fake() -> Tensor:
    with FakeTensorMode():
        return torch.ones(3)


@pytest.mark.parametrize(
    ("make", "remedy"),
    [
        (lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]), r"nested .* tensor\.unbind\(\)"),
        (
            lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged),
            "a NestedTensor cannot travel, it wraps other tensors: send those",
        ),
        (lambda: torch.ones(3, device="meta"), "a meta tensor has no values"),
        (lambda: torch.nn.LazyLinear(3).weight, "run the module once"),
        (lambda: torch.nn.LazyBatchNorm1d().running_mean, "run the module once"),
        pytest.param(
            lambda: torch.ones(3, 3).to_mkldnn(),
            r"an mkldnn tensor cannot travel: send tensor\.to_dense\(\)",
            marks=pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="a build without mkldnn"),
        ),
    ],
    ids=["nested", "jagged", "meta", "lazy_parameter", "lazy_buffer", "mkldnn"],
)
def test_a_tensor_without_plain_memory_is_refused_with_its_remedy(make: Callable[[], Tensor], remedy: str) -> None:
    with pytest.raises(SerializationError, match=remedy):
        check_can_travel(make())


def test_a_fake_tensor_is_refused() -> None:
    with pytest.raises(SerializationError):
        check_can_travel(fake())


def test_a_tensor_inside_a_transform_is_refused() -> None:
    def inside(row: Tensor) -> Tensor:
        check_can_travel(row)
        return row

    with pytest.raises(SerializationError, match=r"inside torch\.func transforms"):
        torch.vmap(inside)(torch.ones(3))


@pytest.mark.parametrize(
    "tensor",
    [torch.ones(3), torch.nn.Parameter(torch.ones(3)), torch.nn.Buffer(torch.ones(1)), COO, torch.empty(0)],
    ids=["dense", "parameter", "buffer", "sparse", "empty"],
)
def test_a_tensor_with_values_may_travel(tensor: Tensor) -> None:
    check_can_travel(tensor)
