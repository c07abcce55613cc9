"""Tensors in memory files, which processes of one machine map privately instead of copying them."""

from __future__ import annotations

import errno
import os
import stat
import weakref
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from torchfedrpc.errors import SerializationError
from torchfedrpc.wire import memory_file
from torchfedrpc.wire.file_pool import FilePool, MemoryFile
from torchfedrpc.wire.memory_file import NAME, UNAVAILABLE
from torchfedrpc.wire.tensors import ALIGNMENT_BYTES, check_extent, dtype_named, memory_of, name_of_dtype

_MAPPED_BYTES = 2 << 20  # smaller objects are copied or sent: to map them would cost as much
_MAX_FILES = 16  # for the tensors of one object: a journal keeps many objects, and descriptors are few
_FILE_BYTES = 4 << 20

_Extent = tuple[int, int, str, tuple[int, ...], tuple[int, ...]]
Address = tuple[int, int, int, list[_Extent]]
"""Where another process finds a file: descriptor, inode, size in bytes, and for each tensor its start and size in
bytes, dtype, shape and strides. Plain data."""


def are_large(tensors: Sequence[Tensor]) -> bool:
    """Return whether tensors are worth memory files: large, and all in host memory."""
    return sum(tensor.nbytes for tensor in tensors) >= _MAPPED_BYTES and all(tensor.is_cpu for tensor in tensors)


def mapped_copies(tensors: Sequence[Tensor], pool: FilePool | None = None) -> tuple[TensorFiles | None, list[Tensor]]:
    """Copy tensors into memory files and map them; (None, []) if they are small or there can be no files.

    Args:
        tensors: Dense ones whose strides leave no gaps.
        pool: Has the files, and takes them back; without it they are new and sealed.

    Raises:
        OSError: If memory is full.
    """
    if not are_large(tensors):
        return None, []
    try:
        files = TensorFiles.of(tensors, pool)
        return files, files.tensors()
    except OSError as error:
        if error.errno not in UNAVAILABLE:
            raise
        return None, []


class TensorFiles:
    """The files of one object's tensors, of about 4 MB each, so that a kept tensor keeps little else in memory.

    A file has no name; the kernel frees it with the last descriptor and mapping. Neither its size nor its bytes
    change while a process has it open or mapped, so a reader may map it without a copy. Seals ensure that; for a file
    of a pool, which is written again later, its pool does.
    """

    def __init__(self) -> None:
        self._files: list[tuple[MemoryFile, Sequence[_Extent]]] = []  # in the order of the tensors
        self._close = weakref.finalize(self, _give_back, self._files)

    @classmethod
    def of(cls, tensors: Sequence[Tensor], pool: FilePool | None = None) -> TensorFiles:
        """Copy tensors into files.

        Args:
            tensors: Dense ones on the CPU, of any dtype, whose strides leave no gaps.
            pool: Has the files, and takes them back; without it the files are new and sealed.

        Raises:
            OSError: If there is no room for them.
        """
        files = cls()
        share = max(sum(tensor.nbytes for tensor in tensors) / _MAX_FILES, _FILE_BYTES)
        groups: list[list[Tensor]] = []
        num_bytes = share
        for tensor in tensors:
            if num_bytes >= share:
                groups.append([])
                num_bytes = 0
            groups[-1].append(tensor)
            num_bytes += tensor.nbytes
        for group in groups:
            files._add(group, pool)
        return files

    @classmethod
    def of_bytes(cls, chunks: Sequence[bytes | memoryview], pool: FilePool | None = None) -> TensorFiles:
        """Copy bytes into one file, as one tensor, uint8 [num_bytes].

        Args:
            chunks: The bytes, one behind the other.
            pool: Has the file, and takes it back; without it the file is new and sealed.

        Raises:
            OSError: If there is no room for it.
        """
        files = cls()
        num_bytes = sum(map(len, chunks))
        files._files.append((_file(chunks, num_bytes, pool), [(0, num_bytes, "uint8", (num_bytes,), (1,))]))
        return files

    @classmethod
    def probe(cls) -> TensorFiles | None:
        """Return an empty file that other processes look for, to learn whether they can open this process's files.

        None on systems without memory files.
        """
        try:
            files = cls()
            files._add([], None)
            return files
        except OSError as error:
            if error.errno not in UNAVAILABLE:
                raise
            return None

    @classmethod
    def at(cls, addresses: Sequence[Address], pid: int) -> TensorFiles:
        """Open the files of another process of this machine.

        Args:
            addresses: From `addresses` in that process; they may be forged.
            pid: The process.

        Raises:
            OSError: If one cannot be opened.
            SerializationError: If one is another file, or tensors reach beyond it.
        """
        files = cls()
        for address in addresses:
            number, inode, num_bytes, extents = _checked_address(address, pid)
            path = f"/proc/{pid}/fd/{number}"
            # The other process chooses the number: opening a pipe or a device could block for ever.
            if not os.readlink(path).startswith(f"/memfd:{NAME}"):
                raise _gone()
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
            files._files.append((MemoryFile(descriptor, num_bytes), extents))
            _check_file(descriptor, inode, num_bytes, extents)
        return files

    @classmethod
    def is_found(cls, pid: int, addresses: Sequence[Address]) -> bool:
        """Return whether this process can open files of another process, whose container or user may differ."""
        try:
            cls.at(addresses, pid).close()
        except (OSError, SerializationError):
            return False
        return True

    def addresses(self) -> list[Address]:
        """Return where other processes of this machine find the files while this process keeps them.

        Files of a pool are used again only if `answered` was called as often as this.
        """
        for file, _ in self._files:
            file.num_requests += 1
        return [
            (file.descriptor, os.fstat(file.descriptor).st_ino, file.num_bytes, list(extents))
            for file, extents in self._files
        ]

    def answered(self) -> None:
        """Note that the receiver of the addresses has opened the files, or will never do so."""
        for file, _ in self._files:
            file.num_requests -= 1

    def acknowledged(self) -> None:
        """Note that no receiver of any address will open the files from now on."""
        for file, _ in self._files:
            file.num_requests = 0

    def close(self) -> None:
        """Close the files; tensors that are mapped stay usable."""
        self._close()

    def tensors(self) -> list[Tensor]:
        """Map the tensors, each with its own storage; writes to them stay private.

        Raises:
            OSError: If there is no address space, or there are too many mappings.
        """
        found: list[Tensor] = []
        for file, extents in self._files:
            path = f"/proc/self/fd/{file.descriptor}"
            try:
                mapped = torch.from_file(path, shared=False, size=file.num_bytes, dtype=torch.uint8, device="cpu")
            except RuntimeError as error:
                raise OSError(errno.ENOMEM, f"{file.num_bytes} bytes cannot be mapped: {error}") from error
            found += [_at_extent(mapped.numpy(), extent) for extent in extents]
        return found

    def _add(self, tensors: Sequence[Tensor], pool: FilePool | None) -> None:
        """Copy tensors into one file."""
        extents: list[_Extent] = []
        chunks: list[bytes | memoryview] = []
        num_bytes = 0
        for tensor in tensors:
            dtype = name_of_dtype(tensor.dtype)
            extents.append((num_bytes, tensor.nbytes, dtype, tuple(tensor.shape), tensor.stride()))
            padding = -tensor.nbytes % ALIGNMENT_BYTES
            chunks += [memory_of(tensor), bytes(padding)]
            num_bytes += tensor.nbytes + padding
        num_bytes = max(num_bytes, 1)
        self._files.append((_file(chunks, num_bytes, pool), extents))


def _give_back(files: list[tuple[MemoryFile, Sequence[_Extent]]]) -> None:
    for file, _ in files:
        file.give_back()


def _file(chunks: Iterable[bytes | memoryview], num_bytes: int, pool: FilePool | None) -> MemoryFile:
    """Write chunks one behind the other into a file of a pool, or into one that never changes again."""
    if pool is not None:
        return pool.file_of(chunks, num_bytes)
    file = MemoryFile(memory_file.create(num_bytes), num_bytes)
    try:
        file.write(chunks)
        memory_file.forbid_writing(file.descriptor)
    except BaseException:
        file.close()
        raise
    return file


def _check_file(descriptor: int, inode: int, num_bytes: int, extents: Sequence[_Extent]) -> None:
    """Check a file that another process has named.

    Raises:
        SerializationError: If it is another file, may shrink, or has not all tensors.
    """
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode) or status.st_ino != inode:
        raise _gone()
    # A file that shrinks under a mapping kills the process that reads there. Only its owner keeps its bytes from
    # changing: it is a process of this user, which a file without a pool forbids to write.
    if not memory_file.has_fixed_size(descriptor):
        raise _gone()
    if status.st_size != num_bytes:
        raise SerializationError("a file has another size than it is said to have")
    for start, num_tensor_bytes, dtype, shape, stride in extents:
        check_extent(shape, stride, 0, dtype_named(dtype), num_tensor_bytes)
        if min(start, num_tensor_bytes) < 0 or start + num_tensor_bytes > num_bytes:
            raise SerializationError("a tensor reaches beyond the file that it lies in")


def _gone() -> SerializationError:
    return SerializationError("the memory file that a call refers to is not there")


def _checked_address(address: Any, pid: Any) -> Address:
    """Check the form of an address, which becomes a path and the size of a mapping.

    Raises:
        SerializationError: If it is of another form than `Address`.
    """
    match address:
        case (int(number), int(inode), int(num_bytes), list(extents) | tuple(extents)) if (
            type(number) is type(pid) is int and number >= 0 < pid and all(map(_is_extent, extents))
        ):
            return number, inode, num_bytes, [(*extent[:3], tuple(extent[3]), tuple(extent[4])) for extent in extents]
    raise SerializationError("what arrived is no address of a file")


def _is_extent(extent: Any) -> bool:
    match extent:
        case (int(), int(), str(), list(shape) | tuple(shape), list(stride) | tuple(stride)):
            return len(shape) == len(stride) and {*map(type, shape), *map(type, stride)} <= {int}
    return False


def _at_extent(memory: Any, extent: _Extent) -> Tensor:
    start, num_bytes, dtype_name, shape, stride = extent
    dtype = dtype_named(dtype_name)
    if not num_bytes:
        return torch.empty(shape, dtype=dtype, device="cpu")
    content = torch.frombuffer(memory, dtype=torch.uint8, count=num_bytes, offset=start)
    return torch.empty(0, dtype=dtype, device="cpu").set_(content.untyped_storage(), 0, shape, stride)
