"""A packed value that many calls share: it is sent and stored once, and each call opens an object from it."""

from __future__ import annotations

import threading
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from torchfedrpc.wire.allowlist import AllowList
from torchfedrpc.wire.file import Address, TensorFiles, mapped_copies
from torchfedrpc.wire.packing import Packed, Parcel, SentApart, pack
from torchfedrpc.wire.tensors import equal_bytes, memory_of


class SharedValue(SentApart):
    """A packed object that is opened many times, each time as a new object.

    Thread-safe. A large value lies in memory files, which each opening maps privately: reading it, as
    ``load_state_dict`` does, costs no copy, and the kernel copies the pages that are written.

    Args:
        parcel: The packed object, which belongs to this value from now on.
        number: Its number, given by the driver, unique in a run.
        num_openings: How often it will be opened, as far as is known; None if that is unknown.

    Attributes:
        num_bytes: Bytes of the pickle and the tensors together.
        is_for_tick: Whether only calls of one tick of the driver's event loop use it; a worker keeps it for those
            calls and no longer.
        num_unsent: Number of calls that have it and were not sent yet; on a worker, that did not arrive yet.
    """

    def __init__(self, parcel: Packed, number: int = 0, num_openings: int | None = None) -> None:
        self.number = number
        self.num_openings = num_openings
        self.is_for_tick = num_openings is not None
        self.num_unsent = num_openings or 0
        self.num_bytes = parcel.num_bytes
        self._parcel = parcel
        self._is_gone = False  # the last opening took the parcel's memory
        self._lock = threading.Lock()

    @property
    def value(self) -> SharedValue:
        """This value."""
        return self

    @property
    def parcel(self) -> Packed:
        """The packed object, for sending; it must not be changed."""
        return self._parcel

    def lend(self) -> tuple[TensorFiles, list[Address]] | None:
        """Return the files of its tensors, and where other processes find these while the files are kept.

        None if the tensors are to be sent instead. The caller keeps the files until the receiver has answered, and
        then calls their `answered`.
        """
        with self._lock:
            files = self._files()
        return (files, files.addresses()) if files is not None else None

    def join(self) -> bool:
        """Announce an opening by one more call. Returns False if the last opening has taken the memory."""
        with self._lock:
            if self._is_gone or self.num_openings is None:
                return False
            self.num_openings += 1
            self.num_unsent += 1
            return True

    def leave(self) -> None:
        """Take back an announcement."""
        with self._lock:
            assert self.num_openings is not None
            self.num_openings -= 1
            self.num_unsent -= 1

    def open(self, allow: AllowList, device: torch.device | None = None) -> Any:
        """Return a new object of this value, with its tensors of GPUs on ``device`` if that is given.

        Raises:
            UntrustedTypeError: If it names a type outside the allow-list.
            SerializationError: If it cannot be read.
            OSError: If there is no memory for it.
        """
        with self._lock:
            if self.num_openings is not None:
                self.num_openings -= 1
            self._is_gone = self._files() is None and self.num_openings == 0
            parcel = self._parcel if self._is_gone else self._copy()
        return parcel.open(allow, device=device)

    def equals(self, obj: Any) -> bool:
        """Return whether an object's present value has the same bits; False if comparing them is costly.

        Raises:
            SerializationError: If the object cannot be packed.
        """
        ours = self._parcel
        if not isinstance(ours, Parcel):
            return False
        theirs = pack(obj, copy=False, join=True)
        return (
            ours.head == theirs.head
            and ours.views == theirs.views
            and len(ours.slots) == len(theirs.slots)
            and all(map(_have_equal_bytes, ours.slots, theirs.slots))
        )

    def _copy(self) -> Packed:
        parcel = self._parcel
        if not isinstance(parcel, Parcel) or not parcel.is_large:
            return parcel.copy()
        files = parcel.files
        if files is None:
            files, mapped = mapped_copies(parcel.slots)
            if files is None:
                return parcel.copy()
            self._parcel = replace(parcel, slots=mapped, files=files)
        return replace(parcel, slots=files.tensors(), files=None)

    def _files(self) -> TensorFiles | None:
        return self._parcel.files if isinstance(self._parcel, Parcel) else None


def shared_values(parcel: Packed) -> tuple[SharedValue, ...]:
    """Return the shared values that a parcel refers to."""
    if not isinstance(parcel, Parcel) or not parcel.apart:
        return ()
    return tuple(value for value in parcel.apart if isinstance(value, SharedValue))


def _have_equal_bytes(ours: Tensor, theirs: Tensor) -> bool:
    if (ours.dtype, ours.shape, ours.stride()) != (theirs.dtype, theirs.shape, theirs.stride()):
        return False
    if ours.is_cuda or theirs.is_cuda:
        return False
    return equal_bytes(memory_of(ours), memory_of(theirs))
