"""Tensors in memory that can be mapped again and again, privately: the kernel copies a page when it is written."""

from __future__ import annotations

import ctypes
import mmap
import os
import tempfile
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from torchfedrpc.wire.tensors import as_bytes

_MAX_FILES = 16  # for the tensors of one object
_ALIGNMENT_BYTES = 64  # kernels may choose another path, and so other last bits, for memory that is aligned otherwise
_FAILED = ctypes.c_void_p(-1).value

# Not the module mmap's own: that keeps a descriptor open for each mapping.
_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]


class TensorFiles:
    """Copies of tensors in a few files: whoever keeps but one of them keeps little more in memory than that.

    Args:
        tensors: dense ones on the CPU, of any dtype, whose strides leave no gaps.
        on_disk: whether they lie in `tempfile`'s folder, and not in memory.

    Raises:
        OSError: there is no room for them.
    """

    def __init__(self, tensors: Sequence[Tensor], *, on_disk: bool = False) -> None:
        share = sum(tensor.nbytes for tensor in tensors) / _MAX_FILES
        groups: list[list[Tensor]] = []
        num_bytes = share
        for tensor in tensors:
            if num_bytes >= share:
                groups.append([])
                num_bytes = 0
            groups[-1].append(tensor)
            num_bytes += tensor.nbytes
        self._files = [TensorFile(group, on_disk=on_disk) for group in groups]

    def tensors(self) -> list[Tensor]:
        """The tensors, each with a storage of its own, in memory that nobody else writes or sees written.

        Raises:
            OSError: there is no address space, or there are too many mappings.
        """
        return [tensor for file in self._files for tensor in file.tensors()]


class TensorFile:
    """Copies of tensors in a file without a name, which is gone with the last that maps it.

    Args:
        tensors: dense ones on the CPU, of any dtype, whose strides leave no gaps.
        on_disk: whether it lies in `tempfile`'s folder, and not in memory.

    Raises:
        OSError: there is no room for it.
    """

    def __init__(self, tensors: Sequence[Tensor], *, on_disk: bool = False) -> None:
        self._layout: list[tuple[int, int, torch.dtype, torch.Size, tuple[int, ...]]] = []
        self._num_bytes = 0
        for tensor in tensors:
            self._layout.append((self._num_bytes, tensor.nbytes, tensor.dtype, tensor.shape, tensor.stride()))
            self._num_bytes += -(-tensor.nbytes // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES
        self._descriptor = _on_disk() if on_disk else os.memfd_create("torchfedrpc-shared")
        weakref.finalize(self, os.close, self._descriptor)
        os.ftruncate(self._descriptor, max(self._num_bytes, 1))
        for tensor, (start, *_) in zip(tensors, self._layout, strict=True):
            content = as_bytes(tensor).numpy().data
            while content:
                written = os.pwrite(self._descriptor, content, start)
                content, start = content[written:], start + written

    def tensors(self) -> list[Tensor]:
        """The tensors, each with a storage of its own, in memory that nobody else writes or sees written.

        Raises:
            OSError: there is no address space, or there are too many mappings.
        """
        memory = self._map()
        return [_in_memory(memory, *place) for place in self._layout]

    def _map(self) -> Any:
        """The file's bytes, as a ctypes array that unmaps them when nothing refers to it any more."""
        num_bytes = max(self._num_bytes, 1)
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
    memory: Any, start: int, num_bytes: int, dtype: torch.dtype, shape: torch.Size, stride: tuple[int, ...]
) -> Tensor:
    if not num_bytes:
        return torch.empty(shape, dtype=dtype)
    content = torch.frombuffer(memory, dtype=torch.uint8, count=num_bytes, offset=start)
    return torch.empty(0, dtype=dtype).set_(content.untyped_storage(), 0, shape, stride)
