"""Tensors in memory that can be mapped again and again, privately: the kernel copies a page when it is written."""

from __future__ import annotations

import itertools
import mmap
import os
import stat
import weakref
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from torchfedrpc.errors import SerializationError
from torchfedrpc.wire.memory import NAME, STAMP_BYTES, UNAVAILABLE, KeptMemory, Memory, is_sealed, map_file, stamp_of
from torchfedrpc.wire.tensors import ALIGNMENT_BYTES, check_extent, dtype_named, memory_of

_MAX_FILES = 16  # for the tensors of one object
_FILE_BYTES = 4 << 20  # fewer where they would have less than that: descriptors are few, and journals keep many
Address = tuple[int, int, int, int, list[tuple[int, int, str, tuple[int, ...], tuple[int, ...]]]]
"""Where another process of this machine finds a file: descriptor, inode, size in bytes, stamp; then for each tensor
where it begins, its size in bytes, its dtype, shape and strides. Plain data."""


class TensorFiles:
    """Tensors in a few files: whoever keeps but one of them keeps little more in memory than that.

    Args:
        files: theirs, in order.
    """

    def __init__(self, files: Sequence[TensorFile]) -> None:
        self._files = files

    @classmethod
    def of(cls, tensors: Sequence[Tensor], *, on_disk: bool = False, kept: KeptMemory | None = None) -> TensorFiles:
        """Copies of tensors; as of `TensorFile.of`."""
        share = max(sum(tensor.nbytes for tensor in tensors) / _MAX_FILES, _FILE_BYTES)
        groups: list[list[Tensor]] = []
        num_bytes = share
        for tensor in tensors:
            if num_bytes >= share:
                groups.append([])
                num_bytes = 0
            groups[-1].append(tensor)
            num_bytes += tensor.nbytes
        return cls([TensorFile.of(group, on_disk=on_disk, kept=kept) for group in groups])

    @classmethod
    def of_bytes(cls, chunks: Sequence[bytes | memoryview], kept: KeptMemory) -> TensorFiles:
        """A copy of bytes, one piece behind the other, as one tensor, uint8 [num_bytes].

        Raises:
            OSError: there is no room for it.
        """
        stops = list(itertools.accumulate(map(len, chunks)))
        memory = kept.take(stops[-1])
        layout = [(0, stops[-1], torch.uint8, (stops[-1],), (1,))]
        file = TensorFile(memory.descriptor, stops[-1], layout, memory, kept)
        memory.write((stop - len(chunk), memoryview(chunk)) for stop, chunk in zip(stops, chunks, strict=True))
        return cls([file])

    @classmethod
    def at(cls, addresses: Sequence[Address], pid: int) -> TensorFiles:
        """Those of another process; as of `TensorFile.at`."""
        return cls([TensorFile.at(address, pid) for address in addresses])

    def addresses(self) -> list[Address]:
        """Where other processes of this machine find them, as long as they are kept here."""
        return [file.address() for file in self._files]

    def close(self) -> None:
        """Close them now; only tensors that were mapped before are still to be used."""
        for file in self._files:
            file.close()

    def use_once(self) -> None:
        """Never write this memory again: somebody who is out of reach may still look for it."""
        for file in self._files:
            file.use_once()

    def tensors(self) -> list[Tensor]:
        """The tensors, each with a storage of its own, in memory that nobody else writes or sees written.

        Raises:
            OSError: there is no address space, or there are too many mappings.
        """
        return [tensor for file in self._files for tensor in file.tensors()]


class TensorFile:
    """Tensors in a file without a name, which is gone with the last that maps it.

    Args:
        descriptor: the file's.
        num_bytes: its size.
        layout: for each tensor where it begins, its size in bytes, its dtype, shape and strides.
        memory: the file, where it is this process's own.
        kept: takes the memory when nothing refers to this any more; without it, that is closed.
    """

    def __init__(
        self,
        descriptor: int,
        num_bytes: int,
        layout: Sequence[tuple[int, int, torch.dtype, tuple[int, ...], tuple[int, ...]]],
        memory: Memory | None = None,
        kept: KeptMemory | None = None,
    ) -> None:
        self._descriptor = descriptor
        self._num_bytes = num_bytes
        self._layout = layout
        self._memory = memory
        let_go: Callable[[], None] = partial(os.close, descriptor)
        if memory is not None:
            let_go = memory.close if kept is None else partial(kept.give_back, memory)
        self._close = weakref.finalize(self, let_go)

    @classmethod
    def of(cls, tensors: Sequence[Tensor], *, on_disk: bool = False, kept: KeptMemory | None = None) -> TensorFile:
        """Copies of tensors.

        Args:
            tensors: dense ones on the CPU, of any dtype, whose strides leave no gaps.
            on_disk: whether the file lies in `tempfile`'s folder, and not in memory.
            kept: has the memory, and takes it back.

        Raises:
            OSError: there is no room for it.
        """
        layout, num_bytes = [], 0
        for tensor in tensors:
            layout.append((num_bytes, tensor.nbytes, tensor.dtype, tuple(tensor.shape), tensor.stride()))
            num_bytes += -(-tensor.nbytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
        num_bytes = max(num_bytes, 1)
        memory = kept.take(num_bytes) if kept is not None else Memory(num_bytes, on_disk=on_disk)
        file = cls(memory.descriptor, num_bytes, layout, memory, kept)
        memory.write((start, memory_of(tensor)) for tensor, (start, *_) in zip(tensors, layout, strict=True))
        return file

    @classmethod
    def probe(cls) -> TensorFile | None:
        """An empty file, for others to find out whether they see this process's; None where it can have none."""
        try:
            return cls.of([])
        except OSError as error:
            if error.errno not in UNAVAILABLE:
                raise
            return None

    @classmethod
    def at(cls, address: Address, pid: int) -> TensorFile:
        """That of another process of this machine, which this one may look into.

        Raises:
            OSError: it cannot be opened.
            SerializationError: it is another file, or not as it is said to be.
        """
        number, inode, num_bytes, stamp, places = _checked_address(address, pid)
        path = f"/proc/{pid}/fd/{number}"
        layout = [(*place[:2], dtype_named(place[2]), *place[3:]) for place in places]
        # The other process chooses the number: of a pipe or a device, even the opening could take for ever.
        if not os.readlink(path).startswith(f"/memfd:{NAME}"):
            raise SerializationError("what a call refers to is not there any more")
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
        file = cls(descriptor, num_bytes, layout)
        status = os.fstat(descriptor)
        is_meant = stat.S_ISREG(status.st_mode) and status.st_ino == inode
        # What is sealed does not shrink under those who map it, nor is it written while any do: see `KeptMemory`.
        if not is_meant or not is_sealed(descriptor):
            raise SerializationError("what a call refers to is not there any more")
        if num_bytes + STAMP_BYTES != os.fstat(descriptor).st_size:
            raise SerializationError("a file has another size than it is said to have")
        if stamp_of(descriptor, num_bytes) != stamp:  # else it stays so, as long as it is open here
            raise SerializationError("what a call refers to is not there any more")
        for start, num_tensor_bytes, dtype, shape, stride in file._layout:
            check_extent(shape, stride, 0, dtype, num_tensor_bytes)
            if min(start, num_tensor_bytes) < 0 or start + num_tensor_bytes > num_bytes:
                raise SerializationError("a tensor reaches beyond the file that it lies in")
        return file

    @classmethod
    def is_found(cls, pid: int, address: Address) -> bool:
        """Whether this process finds a file of that one: they may see different processes, or have other rights."""
        try:
            cls.at(address, pid).close()
        except (OSError, SerializationError):
            return False
        return True

    def close(self) -> None:
        """Close the file now; nobody is to use this any more."""
        self._close()

    def address(self) -> Address:
        """Where other processes of this machine find it, as long as it is kept here."""
        places = [(*place[:2], str(place[2]).removeprefix("torch."), *place[3:]) for place in self._layout]
        assert self._memory is not None
        return self._descriptor, os.fstat(self._descriptor).st_ino, self._num_bytes, self._memory.stamp, places

    def tensors(self) -> list[Tensor]:
        """The tensors, each with a storage of its own, in memory that nobody else writes or sees written.

        Raises:
            OSError: there is no address space, or there are too many mappings.
        """
        if self._memory is not None:
            array = self._memory.map_to_read()
        else:
            array = map_file(self._descriptor, self._num_bytes, mmap.MAP_PRIVATE)
        return [_in_memory(array, *place) for place in self._layout]

    def use_once(self) -> None:
        """Never write this memory again."""
        if self._memory is not None:
            self._memory.is_used_once = True


def _checked_address(address: Any, pid: Any) -> Address:
    """The address, which becomes part of a path and the size of a mapping: another process has sent it.

    Raises:
        SerializationError: it is of another form than `Address`.
    """
    match address:
        case (int(number), int(inode), int(num_bytes), int(stamp), list(places) | tuple(places)) if (
            type(number) is type(pid) is int and number >= 0 < pid and all(map(_is_place, places))
        ):
            return number, inode, num_bytes, stamp, list(places)
    raise SerializationError("what arrived is no address of a file")


def _is_place(place: Any) -> bool:
    match place:
        case (int(), int(), str(), list(shape) | tuple(shape), list(stride) | tuple(stride)):
            return len(shape) == len(stride) and {*map(type, shape), *map(type, stride)} <= {int}
    return False


def _in_memory(
    array: Any, start: int, num_bytes: int, dtype: torch.dtype, shape: tuple[int, ...], stride: tuple[int, ...]
) -> Tensor:
    if not num_bytes:
        return torch.empty(shape, dtype=dtype)
    content = torch.frombuffer(array, dtype=torch.uint8, count=num_bytes, offset=start)
    return torch.empty(0, dtype=dtype).set_(content.untyped_storage(), 0, shape, stride)
