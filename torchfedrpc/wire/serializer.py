"""Parcels as bytes, for files and for users: the format of `ParameterSerializer`."""

from __future__ import annotations

import math
import pickle
import struct
import zlib
from collections.abc import Iterable
from typing import Any

import torch

from torchfedrpc.errors import SerializationError
from torchfedrpc.wire.allowlist import AllowList
from torchfedrpc.wire.packing import Parcel, pack
from torchfedrpc.wire.tensors import ALIGNMENT_BYTES, check_extent, dtype_named, memory_of, name_of_dtype

# Layout: magic, a checksum of table and head, the lengths of both, both, then each slot's memory at a multiple of 64.
_MAGIC = b"TFR\x03"
_PREFIX = struct.Struct("<4sIQQ")
_NO_TYPES = AllowList()  # none besides the types that any sender may use


class ParameterSerializer:
    """Turns any object with tensors (a state dict, a whole result) into bytes and back."""

    @staticmethod
    def serialize(obj: Any) -> bytes:
        """Return an object as bytes.

        Tensors keep dtype (bf16, fp8, bool, complex, quantised and sparse ones too), shape, strides, requires_grad,
        Parameter-ness and ``grad``; those that share a storage stay tied.

        Raises:
            SerializationError: If it cannot be pickled, or holds a tensor without values (nested, mkldnn, meta).
        """
        return b"".join(chunks_of(pack(obj, copy=False)))

    @staticmethod
    def deserialize(
        data: bytes | bytearray | memoryview,
        device: torch.device | str | None = None,
        *,
        trusted_modules: Iterable[str] = (),
    ) -> Any:
        """Return a new object from bytes that `serialize` returned.

        Args:
            data: The bytes.
            device: The device of the tensors; the CPU by default.
            trusted_modules: Top-level packages whose classes may be among the data, beside plain data.

        Raises:
            UntrustedTypeError: If the data names a type outside the allow-list.
            SerializationError: If the bytes are damaged or of another format.
        """
        try:
            return read(data, device=device).open(AllowList(trusted_modules))
        except SerializationError:
            raise
        except Exception as error:
            raise SerializationError(
                f"these bytes are damaged or not from ParameterSerializer.serialize: {error}"
            ) from error


def chunks_of(parcel: Parcel) -> list[bytes | memoryview]:
    """Return the bytes of a parcel in pieces, to be written one behind the other.

    The pieces of CPU tensors share the parcel's memory; the parcel can still be opened afterwards.
    """
    if parcel.ready is not None:
        parcel.ready.wait()
    slots = [slot.cpu() for slot in parcel.slots]
    layouts = [
        (name_of_dtype(slot.dtype), tuple(slot.shape), slot.stride(), slot.nbytes, origin.is_cuda)
        for slot, origin in zip(slots, parcel.slots, strict=True)
    ]
    table = pickle.dumps((parcel.views, layouts), protocol=5)
    prefix = _PREFIX.pack(_MAGIC, _checksum(table, parcel.head), len(table), len(parcel.head))
    chunks: list[bytes | memoryview] = [prefix, table, parcel.head]
    position = sum(len(chunk) for chunk in chunks)
    for slot in slots:
        padding = -position % ALIGNMENT_BYTES
        chunks += [bytes(padding), memory_of(slot)]
        position += padding + slot.nbytes
    return chunks


def read(
    serialized: bytes | bytearray | memoryview,
    *,
    device: torch.device | str | None = None,
    gpu: torch.device | None = None,
    in_place: bool = False,
) -> Parcel:
    """Return the parcel of bytes from `chunks_of`, on new memory.

    Args:
        serialized: The bytes.
        device: The device of all tensors; None keeps those of the CPU there.
        gpu: The device of tensors that were on a GPU, unless ``device`` is given; None for the CPU.
        in_place: Whether tensors lie in the bytes themselves, which must be writable, instead of new memory.

    Raises:
        SerializationError: If the bytes are damaged or of another format.
    """
    data = memoryview(serialized).cast("B")
    magic, checksum, table_bytes, head_bytes = _PREFIX.unpack_from(data)
    if magic != _MAGIC:
        raise SerializationError("these bytes are not from ParameterSerializer.serialize of this version")
    position = _PREFIX.size + table_bytes
    if position + head_bytes > len(data):
        raise SerializationError("these bytes are cut short")
    if _checksum(data[_PREFIX.size : position], data[position : position + head_bytes]) != checksum:
        raise SerializationError("these bytes are damaged")
    table = bytes(data[_PREFIX.size : position])
    views, layouts = Parcel(table, [], []).open(_NO_TYPES)
    if type(views) is not list:
        raise SerializationError("these bytes have a table without a list of views")
    head = bytes(data[position : position + head_bytes])
    position += head_bytes
    slots = []
    for dtype_name, shape, stride, num_bytes, was_on_gpu in layouts:
        position += -position % ALIGNMENT_BYTES
        if not 0 <= num_bytes <= len(data) - position:
            raise SerializationError("these bytes are cut short")
        content = data[position : position + num_bytes]
        position += num_bytes
        dtype = dtype_named(dtype_name)
        if in_place and num_bytes:
            memory = torch.frombuffer(content, dtype=torch.uint8)
        else:
            memory = torch.empty(num_bytes, dtype=torch.uint8)
            if num_bytes:  # an empty view has other memory
                memory_of(memory)[:] = content
        check_extent(shape, stride, 0, dtype, num_bytes)
        if math.prod(shape) * dtype.itemsize != num_bytes:
            raise SerializationError("a tensor's memory is not that of its elements")
        slot = torch.empty(0, dtype=dtype).set_(memory.untyped_storage(), 0, shape, stride)
        target = device if device is not None or not was_on_gpu else gpu
        slots.append(slot if target is None else slot.to(target))
    return Parcel(head, views, slots, copies_arrays=True)


def _checksum(table: bytes | memoryview, head: bytes | memoryview) -> int:
    """Return the checksum of both pickles: after a flipped bit, unpickling could take all memory before it fails."""
    return zlib.crc32(head, zlib.crc32(table))
