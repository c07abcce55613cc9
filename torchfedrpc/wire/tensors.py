"""Tensors as dense slots and views: special layouts taken apart, shared storages kept tied, small ones joined."""

from __future__ import annotations

import ctypes
import functools
import math
import sys
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any, TypeGuard

import numpy as np
import torch
from torch import Tensor
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from torchfedrpc.errors import SerializationError

_SPARSE_COMPRESSED = (torch.sparse_csr, torch.sparse_csc, torch.sparse_bsr, torch.sparse_bsc)
_SMALL_BYTES = 65536  # smaller tensors are joined: copying them twice is faster than sending one more tensor
ALIGNMENT_BYTES = 64  # kernels may compute other last bits for memory with another alignment

_split: Any = torch.split_with_sizes_copy  # torch's type stubs have it return nothing

# How a tensor lies in a slot:
# - the slot's number, if the tensor is the whole slot;
# - number and shape, if it is joined with other small tensors, which follow each other in the order of their views;
# - number, dtype, shape, strides and offset otherwise;
# - the same and the number of elements of the receiver's memory, if its strides leave gaps: the slot has the elements
#   without gaps, one for each dimension of stride 0.
View = (
    int
    | tuple[int, tuple[int, ...]]
    | tuple[int, str, tuple[int, ...], tuple[int, ...], int]
    | tuple[int, str, tuple[int, ...], tuple[int, ...], int, int]
)
SPREAD = 4096
"""Memory may be this many times the size of the elements that lie in it with gaps: a few bytes from a sender must not
claim gigabytes. A column of a table with up to 4096 columns fits."""
_INTEGERS = frozenset([int])
_SPREAD_ELEMENTS = 1 << 14  # memory for so many elements is always allowed


class PlainTensors:
    """A context in which new tensors have no autograd history and are no inference tensors."""

    __slots__ = ("_grad", "_guard")

    def __enter__(self) -> None:
        self._guard: Any = None
        if torch.is_inference_mode_enabled():
            self._guard = torch.inference_mode(False)
            self._guard.__enter__()
        self._grad = torch.is_grad_enabled()
        torch._C._set_grad_enabled(False)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        torch._C._set_grad_enabled(self._grad)
        if self._guard is not None:
            self._guard.__exit__(kind, error, trace)


def check_can_travel(tensor: Tensor) -> None:
    """Check that a tensor has memory to send, and does not abort the process when torch RPC sends it.

    Raises:
        SerializationError: If it is a nested, mkldnn, meta, fake, uninitialised or wrapper tensor.
    """
    if is_lazy(tensor):
        raise SerializationError("an uninitialised (lazy) parameter cannot travel: run the module once before")
    wraps_others: bool = is_traceable_wrapper_subclass(tensor)
    if wraps_others:
        raise SerializationError(
            f"a {type(tensor).__name__} cannot travel, it wraps other tensors: send those, or its full_tensor()"
        )
    if tensor.is_nested:
        raise SerializationError("a nested tensor cannot travel: send the list of its parts, tensor.unbind()")
    if tensor.is_mkldnn:
        raise SerializationError("an mkldnn tensor cannot travel: send tensor.to_dense()")
    fake = sys.modules.get("torch._subclasses.fake_tensor")  # no fake tensor exists unless this module is imported
    if fake is not None and isinstance(tensor, fake.FakeTensor):
        raise SerializationError("a fake tensor has no values to send")
    if tensor.is_meta:
        raise SerializationError("a meta tensor has no values to send: materialise it, or send its shape")
    if torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        raise SerializationError("a tensor inside torch.func transforms cannot travel: return it from them first")


def restore_special(kind: str, *parts: Any) -> Tensor:
    """Return the tensor of the kind and parts that `take_apart` returned."""
    if kind == "sparse_coo":
        indices, values, shape, coalesced = parts
        return torch.sparse_coo_tensor(indices, values, shape, is_coalesced=coalesced, check_invariants=True)
    if kind == "sparse_compressed":
        compressed, plain, values, shape, layout = parts
        return torch.sparse_compressed_tensor(compressed, plain, values, shape, layout=layout, check_invariants=True)
    if kind == "per_tensor":
        return torch._make_per_tensor_quantized_tensor(*parts)
    if kind == "per_channel":
        return torch._make_per_channel_quantized_tensor(*parts)
    raise SerializationError("unknown kind of tensor")


def take_apart(tensor: Tensor) -> tuple[Any, ...] | None:
    """Return the kind and the dense parts of a sparse or quantised tensor; None for a dense one."""
    if tensor.layout is torch.sparse_coo:
        return (
            "sparse_coo",
            tensor._indices(),
            tensor._values(),
            tuple(tensor.shape),
            tensor.is_coalesced(),
        )
    if tensor.layout in _SPARSE_COMPRESSED:
        by_row = tensor.layout in (torch.sparse_csr, torch.sparse_bsr)
        compressed = tensor.crow_indices() if by_row else tensor.ccol_indices()
        plain = tensor.col_indices() if by_row else tensor.row_indices()
        return "sparse_compressed", compressed, plain, tensor.values(), tuple(tensor.shape), tensor.layout
    if tensor.is_quantized:
        if tensor.qscheme() is torch.per_tensor_affine:
            return "per_tensor", tensor.int_repr(), tensor.q_scale(), tensor.q_zero_point()
        if tensor.qscheme() is torch.per_channel_affine:
            scales, zero_points = tensor.q_per_channel_scales(), tensor.q_per_channel_zero_points()
            return "per_channel", tensor.int_repr(), scales, zero_points, tensor.q_per_channel_axis()
        raise SerializationError(f"a tensor quantised by {tensor.qscheme()} cannot travel: send tensor.dequantize()")
    return None


def is_plain(tensor: Tensor) -> bool:
    """Return whether a tensor is plain dense CPU memory, so that it needs no `check_can_travel`.

    False for a tensor in any special mode, layout or transform, or on another device.
    """
    keys: bool = torch._C._dispatch_keys(tensor).raw_repr() == _plain_keys()
    return keys


def gather_slots(tensors: list[Tensor], *, copy: bool, join: bool) -> tuple[list[View], list[Tensor]]:
    """Return the memory of dense tensors as slots, each part of it once, and how every tensor lies in them.

    A tensor alone on its storage becomes one slot, with its strides if they leave no gaps, or is joined with others.
    Tensors that overlap or adjoin on one storage share a slot, the bytes that they span, and so stay tied.

    Args:
        tensors: Dense tensors of any dtype and device.
        copy: Whether the slots are new memory; otherwise they may alias the tensors.
        join: Whether small tensors of a dtype that are alone on their storages become one slot together.

    Returns:
        A view for each tensor, and the slots.
    """
    views: list[View] = [0] * len(tensors)
    slots: list[Tensor] = []
    by_storage: dict[int, list[int]] = {}
    small: dict[torch.dtype, list[int]] = {}
    for index, tensor in enumerate(tensors):
        if tensor.numel():
            by_storage.setdefault(tensor.untyped_storage()._cdata, []).append(index)
        else:  # empty: nothing to share, and its storage may be no memory at all
            views[index] = len(slots)
            slots.append(tensor.clone() if copy else tensor)
    for members in by_storage.values():
        if len(members) == 1:
            (index,) = members
            tensor = tensors[index]
            if join and _is_small(tensor):
                small.setdefault(tensor.dtype, []).append(index)
                continue
            views[index], slot = _lone_slot(tensor, len(slots), copy=copy)
            if slot is not None:
                slots.append(slot)
                continue
        for start, stop, cluster in _clusters(tensors, members):
            span = _span(tensors[cluster[0]], start, stop)
            for index in cluster:
                tensor = tensors[index]
                offset = (tensor.storage_offset() * tensor.itemsize - start) // tensor.itemsize
                views[index] = (
                    len(slots),
                    name_of_dtype(tensor.dtype),
                    tuple(tensor.shape),
                    tensor.stride(),
                    offset,
                )
            slots.append(span.clone() if copy else span)
    for members in small.values():
        if len(members) == 1:
            views[members[0]] = len(slots)
            slots.append(_dense(tensors[members[0]], copy=copy))
            continue
        for index in members:
            views[index] = (len(slots), tuple(tensors[index].shape))
        slots.append(torch._C._nn.flatten_dense_tensors([tensors[index] for index in members]))
    return views, slots


def is_joined(view: View) -> TypeGuard[tuple[int, tuple[int, ...]]]:
    """Return whether it is the view of a small tensor that is joined with others in a slot."""
    return type(view) is tuple and len(view) == 2 and type(view[0]) is int  # other objects are slow to hash


def lay_out(
    views: list[View], slots: list[Tensor], spend: Callable[[int], None] = lambda num_bytes: None
) -> list[Tensor]:
    """Return the tensors that the views describe; each joined tensor gets new memory.

    Args:
        views: How they lie in the slots; they may be forged.
        slots: Their memory.
        spend: Is called with the bytes of memory that are taken beside the slots.

    Raises:
        SerializationError: If a view does not fit its slot.
    """
    tensors: list[Any] = [None] * len(views)
    joined: dict[int, list[int]] = {}
    for index, view in enumerate(views):
        if type(view) is int:  # the most frequent case
            tensors[index] = slots[view]
        elif is_joined(view):
            joined.setdefault(view[0], []).append(index)
        else:
            if isinstance(view, tuple) and len(view) == 6:
                _check_sizes(view[5:])
                spend(16 * view[5])
            tensors[index] = _view_slot(view, slots)
    for number, members in joined.items():
        shapes: list[Any] = [views[index][1] for index in members]  # type: ignore[index]
        for shape in shapes:
            _check_sizes(shape)
        sizes = [math.prod(shape) for shape in shapes]
        if slots[number].dim() != 1 or sum(sizes) != slots[number].numel():
            raise SerializationError("small tensors came with shapes that do not fit the memory that they share")
        spend(slots[number].nbytes)
        parts = _split(slots[number], sizes)
        for index, part, shape in zip(members, parts, shapes, strict=True):
            if min(shape, default=0) < 0:
                raise SerializationError(f"a tensor cannot have the shape {shape}")
            tensors[index] = part if len(shape) == 1 else part.resize_(shape)
    return tensors


def _view_slot(view: Any, slots: list[Tensor]) -> Tensor:
    _check_sizes(view[:1])
    number, dtype_name, shape, stride, offset, *spread = view
    dtype, slot = dtype_named(dtype_name), slots[number]
    if spread:
        return _spread_out(slot, dtype, shape, stride, offset, *spread)
    offset += int(slot.storage_offset()) * slot.itemsize // dtype.itemsize  # the slot may be a part of a storage
    check_extent(shape, stride, offset, dtype, slot.untyped_storage().nbytes())
    return torch.empty(0, dtype=dtype, device=slot.device).set_(slot.untyped_storage(), offset, shape, stride)


def _spread_out(
    slot: Tensor, dtype: torch.dtype, shape: tuple[int, ...], stride: tuple[int, ...], offset: int, num_elements: int
) -> Tensor:
    """Return a tensor with gaps between its elements, which the slot has without gaps."""
    _check_sizes(shape, stride, (offset, num_elements))
    compact = _without_repeats(shape, stride)
    if not _may_spread(math.prod(compact), num_elements) or slot.dtype != dtype or tuple(slot.shape) != compact:
        raise SerializationError("a tensor has gaps that do not fit its elements")
    check_extent(shape, stride, offset, dtype, num_elements * dtype.itemsize)
    memory = torch.zeros(num_elements, dtype=dtype, device=slot.device)
    memory.as_strided(compact, stride, offset).copy_(slot)
    return memory.as_strided(shape, stride, offset)


def _without_repeats(shape: tuple[int, ...], stride: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(1 if not step else size for size, step in zip(shape, stride, strict=True))


def _may_spread(num_compact: int, num_elements: int) -> bool:
    return 0 <= num_elements <= max(_SPREAD_ELEMENTS, SPREAD * num_compact)


def _check_sizes(*sizes: Any) -> None:
    """Check that sizes are tuples of integers: a product of other objects can take all memory."""
    if not all(type(part) is tuple and _INTEGERS.issuperset(map(type, part)) for part in sizes):
        raise SerializationError("a tensor came with a shape or strides that are no numbers")


def name_of_dtype(dtype: torch.dtype) -> str:
    """Return the name of a dtype, such as ``float32``, which `dtype_named` reads."""
    return str(dtype).removeprefix("torch.")


def dtype_named(name: str) -> torch.dtype:
    """Return the dtype of a name such as ``float32``.

    Raises:
        SerializationError: If torch has no such dtype.
    """
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise SerializationError(f"unknown dtype {name}")
    return dtype


def check_extent(
    shape: tuple[int, ...], stride: tuple[int, ...], offset: int, dtype: torch.dtype, num_bytes: int
) -> None:
    """Check that a tensor lies within its memory, which torch would enlarge otherwise."""
    _check_sizes(shape, stride, (offset, num_bytes))
    last = offset + reach(shape, stride)[1]
    if min(offset, *shape, *stride, 0) < 0 or (0 not in shape and (last + 1) * dtype.itemsize > num_bytes):
        raise SerializationError("a tensor reaches beyond the memory that came with it")


def _dense(tensor: Tensor, *, copy: bool) -> Tensor:
    """Return a tensor without gaps as a slot.

    Raises:
        SerializationError: If its storage was freed.
    """
    if (_last_element(tensor) + 1) * tensor.itemsize > tensor.untyped_storage().nbytes():
        raise SerializationError("the storage of this tensor was freed or resized below its shape")
    if copy or not fills_its_storage(tensor):
        return tensor.clone(memory_format=torch.preserve_format)
    return tensor.detach()


def _lone_slot(tensor: Tensor, number: int, *, copy: bool) -> tuple[View, Tensor | None]:
    """Return the view of a tensor that is alone on its storage, and its slot; None for the memory that it spans.

    Raises:
        SerializationError: If its storage was freed, or its elements lie too far apart.
    """
    aligned = max(ALIGNMENT_BYTES // tensor.itemsize, 1)  # elements from one aligned address to the next
    start = int(tensor.storage_offset()) % aligned
    if tensor.is_contiguous():
        return (number, None) if start else (number, _dense(tensor, copy=copy))
    shape, stride = tuple(tensor.shape), tensor.stride()
    compact = tensor.as_strided(_without_repeats(shape, stride), stride, tensor.storage_offset())
    if _overlaps(compact):
        return number, None
    slot = _dense(compact, copy=True)
    if slot.stride() == stride and slot.shape == tensor.shape and not start:
        return number, slot
    num_elements = start + _last_element(tensor) - int(tensor.storage_offset()) + 1
    if not _may_spread(int(compact.numel()), num_elements):
        raise SerializationError(
            f"a tensor whose {compact.numel()} elements lie in memory for {num_elements} cannot travel as it is: "
            f"send tensor.clone(memory_format=torch.contiguous_format)"
        )
    return (number, name_of_dtype(tensor.dtype), shape, stride, start, num_elements), slot.contiguous()


def reach(shape: Sequence[int], steps: Sequence[int]) -> tuple[int, int]:
    """Return how far the first and the last element in memory are from that of index 0, in the unit of the steps."""
    ends = [(size - 1) * step for size, step in zip(shape, steps, strict=True)]
    return sum(end for end in ends if end < 0), sum(end for end in ends if end > 0)


def _last_element(tensor: Tensor) -> int:
    return int(tensor.storage_offset()) + reach(tensor.shape, tensor.stride())[1]


def _overlaps(tensor: Tensor) -> bool:
    """Return whether elements may share memory: a dimension's stride is within the reach of smaller strides."""
    reach = 0
    for step, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1 and step <= reach:
            return True
        reach += (size - 1) * step
    return False


def _is_small(tensor: Tensor) -> bool:
    """Return whether to join a tensor with others; False if its storage was freed, which `_dense` refuses."""
    num_bytes = tensor.nbytes
    if num_bytes > _SMALL_BYTES or not tensor.is_cpu:
        return False
    start, stride = int(tensor.storage_offset()) * tensor.itemsize, tensor.stride()
    return (
        not start % ALIGNMENT_BYTES
        and (stride == (1,) or stride == _row_major(tensor.shape))
        and start + num_bytes <= tensor.untyped_storage().nbytes()
    )


@functools.lru_cache(1024)
def _row_major(shape: torch.Size) -> tuple[int, ...]:
    """Return the strides of a tensor whose elements lie in the order of their indices."""
    return tuple(math.prod(shape[dim + 1 :]) for dim in range(len(shape)))


@functools.cache
def _plain_keys() -> Any:
    with torch.inference_mode(False):
        return torch._C._dispatch_keys(torch.empty(0, device="cpu")).raw_repr()


def fills_its_storage(tensor: Tensor) -> bool:
    """Return whether a dense tensor lies in the order of its indices, without gaps around or between its elements."""
    return tensor.is_contiguous() and tensor.untyped_storage().nbytes() == tensor.numel() * tensor.itemsize


def _clusters(tensors: list[Tensor], members: list[int]) -> list[tuple[int, int, list[int]]]:
    """Group tensors of one storage into stretches of bytes that overlap or adjoin: (start, stop, members)."""
    extents: list[tuple[int, int, int]] = []
    for index in members:
        tensor = tensors[index]
        start = int(tensor.storage_offset()) * tensor.itemsize
        extents.append((start, (_last_element(tensor) + 1) * tensor.itemsize, index))
    extents.sort()
    clusters: list[tuple[int, int, list[int]]] = []
    for start, stop, index in extents:
        if clusters and start <= clusters[-1][1]:
            first, end, group = clusters[-1]
            clusters[-1] = (first, max(end, stop), [*group, index])
        else:
            clusters.append((start - start % ALIGNMENT_BYTES, stop, [index]))
    return clusters


def _span(tensor: Tensor, start: int, stop: int) -> Tensor:
    """Return the bytes [start, stop) of a tensor's storage, as a uint8 tensor [stop - start]."""
    storage = tensor.untyped_storage()
    if stop > storage.nbytes():
        raise SerializationError("the storage of this tensor was freed or resized below its shape")
    return torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(storage, start, (stop - start,), (1,))


def memory_of(tensor: Tensor) -> memoryview:
    """Return the memory of a dense CPU tensor whose strides leave no gaps, as bytes; the view keeps it alive.

    It does not use ``tensor.numpy()``, after which the storage can never be resized.
    """
    if not tensor.nbytes:
        return memoryview(b"")
    memory: Any = (ctypes.c_ubyte * tensor.nbytes).from_address(tensor.data_ptr())
    memory.owner = tensor
    return memoryview(memory).cast("B")


def equal_bytes(one: memoryview, other: memoryview) -> bool:
    """Return whether two pieces of memory have the same bytes."""
    num_words = len(one) // 8  # comparing 40 MB takes 8 ms as words, and 45 ms as bytes
    return (
        len(one) == len(other)
        and one[8 * num_words :] == other[8 * num_words :]
        and np.array_equal(np.frombuffer(one, np.uint64, num_words), np.frombuffer(other, np.uint64, num_words))
    )


class Fence:
    """Events on the CUDA streams of the thread that makes it, behind the work on some tensors.

    Args:
        tensors: Tensors on GPUs.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._tensors = tensors
        devices = dict.fromkeys(tensor.device for tensor in tensors)
        self._events = {device: torch.cuda.current_stream(device).record_event() for device in devices}

    def wait(self) -> None:
        """Let the calling thread's streams wait for the events.

        The tensors' memory is not reused before those streams are done with it.
        """
        for device, event in self._events.items():
            torch.cuda.current_stream(device).wait_event(event)
        for tensor in self._tensors:
            tensor.record_stream(torch.cuda.current_stream(tensor.device))


def fence(tensors: Sequence[Tensor]) -> Fence | None:
    """Return a fence behind this thread's work on these tensors; None if no tensor is on a GPU."""
    on_gpu = [tensor for tensor in tensors if tensor.is_cuda]
    return Fence(on_gpu) if on_gpu else None
