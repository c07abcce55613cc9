"""Tensors in memory that can be mapped again and again, privately: the kernel copies a page when it is written."""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import os
import tempfile
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from torchfedrpc.errors import SerializationError
from torchfedrpc.wire.tensors import ALIGNMENT_BYTES, as_bytes, check_extent, dtype_named

_NAME = "torchfedrpc-shared"
_MAX_FILES = 16  # for the tensors of one object
_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE
Address = tuple[int, int, int, list[tuple[int, int, str, tuple[int, ...], tuple[int, ...]]]]
"""Where another process of this machine finds a file: descriptor, inode, size in bytes; then for each tensor where it
begins, its size in bytes, its dtype, shape and strides. Plain data."""

_FAILED = ctypes.c_void_p(-1).value

# Not the module mmap's own: that keeps a descriptor open for each mapping.
_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]


class TensorFiles:
    """Tensors in a few files: whoever keeps but one of them keeps little more in memory than that.

    Args:
        files: theirs, in order.
    """

    def __init__(self, files: Sequence[TensorFile]) -> None:
        self._files = files

    @classmethod
    def of(cls, tensors: Sequence[Tensor], *, on_disk: bool = False) -> TensorFiles:
        """Copies of tensors; as of `TensorFile.of`."""
        share = sum(tensor.nbytes for tensor in tensors) / _MAX_FILES
        groups: list[list[Tensor]] = []
        num_bytes = share
        for tensor in tensors:
            if num_bytes >= share:
                groups.append([])
                num_bytes = 0
            groups[-1].append(tensor)
            num_bytes += tensor.nbytes
        return cls([TensorFile.of(group, on_disk=on_disk) for group in groups])

    @classmethod
    def at(cls, addresses: Sequence[Address], pid: int) -> TensorFiles:
        """Those of another process; as of `TensorFile.at`."""
        return cls([TensorFile.at(address, pid) for address in addresses])

    def addresses(self) -> list[Address]:
        """Where other processes of this machine find them, as long as they are kept here."""
        return [file.address() for file in self._files]

    def tensors(self) -> list[Tensor]:
        """The tensors, each with a storage of its own, in memory that nobody else writes or sees written.

        Raises:
            OSError: there is no address space, or there are too many mappings.
        """
        return [tensor for file in self._files for tensor in file.tensors()]


class TensorFile:
    """Tensors in a file without a name, which is gone with the last that maps it.

    Args:
        descriptor: the file's, to be closed with this.
        num_bytes: its size.
        layout: for each tensor where it begins, its size in bytes, its dtype, shape and strides.
    """

    def __init__(
        self,
        descriptor: int,
        num_bytes: int,
        layout: Sequence[tuple[int, int, torch.dtype, tuple[int, ...], tuple[int, ...]]],
    ) -> None:
        self._descriptor = descriptor
        self._close = weakref.finalize(self, os.close, descriptor)
        self._num_bytes = num_bytes
        self._layout = layout

    @classmethod
    def of(cls, tensors: Sequence[Tensor], *, on_disk: bool = False) -> TensorFile:
        """Copies of tensors.

        Args:
            tensors: dense ones on the CPU, of any dtype, whose strides leave no gaps.
            on_disk: whether the file lies in `tempfile`'s folder, and not in memory.

        Raises:
            OSError: there is no room for it.
        """
        layout, num_bytes = [], 0
        for tensor in tensors:
            layout.append((num_bytes, tensor.nbytes, tensor.dtype, tuple(tensor.shape), tensor.stride()))
            num_bytes += -(-tensor.nbytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
        num_bytes = max(num_bytes, 1)
        descriptor = _on_disk() if on_disk else os.memfd_create(_NAME, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        file = cls(descriptor, num_bytes, layout)
        os.ftruncate(descriptor, num_bytes)
        for tensor, (start, *_) in zip(tensors, layout, strict=True):
            content, position = as_bytes(tensor).numpy().data, start
            while content:
                written = os.pwrite(descriptor, content, position)
                content, position = content[written:], position + written
        if not on_disk:
            fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, _SEALS)
        return file

    @classmethod
    def at(cls, address: Address, pid: int) -> TensorFile:
        """That of another process of this machine, which this one may look into.

        Raises:
            OSError: it cannot be opened.
            SerializationError: it is another file, or not as it is said to be.
        """
        number, inode, num_bytes, places = address
        path = f"/proc/{pid}/fd/{number}"
        layout = [(*place[:2], dtype_named(place[2]), *place[3:]) for place in places]
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        file = cls(descriptor, num_bytes, layout)
        is_meant = os.readlink(path).startswith(f"/memfd:{_NAME}") and os.fstat(descriptor).st_ino == inode
        # What is sealed neither changes nor shrinks under those who map it.
        if not is_meant or fcntl.fcntl(descriptor, fcntl.F_GET_SEALS) & _SEALS != _SEALS:
            raise SerializationError("what a call refers to is not there any more")
        if num_bytes != os.fstat(descriptor).st_size:
            raise SerializationError("a file has another size than it is said to have")
        for start, num_tensor_bytes, dtype, shape, stride in file._layout:
            check_extent(shape, stride, 0, dtype, num_tensor_bytes)
            if min(start, num_tensor_bytes) < 0 or start + num_tensor_bytes > num_bytes:
                raise SerializationError("a tensor reaches beyond the file that it lies in")
        return file

    def close(self) -> None:
        """Close the file now; nobody is to use this any more."""
        self._close()

    def address(self) -> Address:
        """Where other processes of this machine find it, as long as it is kept here."""
        places = [(*place[:2], str(place[2]).removeprefix("torch."), *place[3:]) for place in self._layout]
        return self._descriptor, os.fstat(self._descriptor).st_ino, self._num_bytes, places

    def tensors(self) -> list[Tensor]:
        """The tensors, each with a storage of its own, in memory that nobody else writes or sees written.

        Raises:
            OSError: there is no address space, or there are too many mappings.
        """
        memory = self._map()
        return [_in_memory(memory, *place) for place in self._layout]

    def _map(self) -> Any:
        """The file's bytes, as a ctypes array that unmaps them when nothing refers to it any more."""
        num_bytes = self._num_bytes
        access = mmap.PROT_READ | mmap.PROT_WRITE
        address = _libc.mmap(None, num_bytes, access, mmap.MAP_PRIVATE, self._descriptor, 0)
        if address == _FAILED:
            number = ctypes.get_errno()
            raise OSError(number, f"{os.strerror(number)}: {num_bytes} bytes that calls share cannot be mapped")
        memory = (ctypes.c_char * num_bytes).from_address(address)
        # Not at exit, when tensors may still be looked at.
        weakref.finalize(memory, _libc.munmap, address, num_bytes).atexit = False
        return memory


def _on_disk() -> int:
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())


def _in_memory(
    memory: Any, start: int, num_bytes: int, dtype: torch.dtype, shape: tuple[int, ...], stride: tuple[int, ...]
) -> Tensor:
    if not num_bytes:
        return torch.empty(shape, dtype=dtype)
    content = torch.frombuffer(memory, dtype=torch.uint8, count=num_bytes, offset=start)
    return torch.empty(0, dtype=dtype).set_(content.untyped_storage(), 0, shape, stride)
