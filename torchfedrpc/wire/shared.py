"""A value that many calls have in common: there once, and given to each as an object of its own."""

from __future__ import annotations

import threading
from dataclasses import replace
from typing import Any

import numpy as np
from torch import Tensor

from torchfedrpc.wire.allowlist import AllowList
from torchfedrpc.wire.file import Address, TensorFiles
from torchfedrpc.wire.packing import Packed, Parcel, SentApart, mapped_copies, pack
from torchfedrpc.wire.tensors import memory_of


class SharedValue(SentApart):
    """A packed object that is opened many times, each time as one that nobody else holds.

    Thread-safe. A large one lies in memory that each opening maps privately: whoever only reads it, as
    ``load_state_dict`` does, costs no copy, and for whoever writes the kernel copies the pages that change.

    Args:
        parcel: the object, which is this one's alone from now on.
        number: what the driver calls it, in a run.
        num_openings: how often it will be opened at most; None where nobody knows.

    Attributes:
        num_bytes: bytes of the pickle and the tensors together.
        is_for_tick: whether it is for calls of one tick of the driver's loop alone, so that a worker to which it is
            sent keeps it for those calls and no longer.
    """

    def __init__(self, parcel: Packed, number: int = 0, num_openings: int | None = None) -> None:
        self.number = number
        self.num_openings = num_openings
        self.is_for_tick = num_openings is not None
        self.num_bytes = parcel.num_bytes
        self._parcel = parcel
        self._lock = threading.Lock()

    @property
    def value(self) -> SharedValue:
        """This."""
        return self

    @property
    def parcel(self) -> Packed:
        """The packed object, to be sent; nothing may change it."""
        return self._parcel

    def lend(self) -> tuple[TensorFiles, list[Address]] | None:
        """The files of its tensors, and where other processes of this machine find these as long as they are kept.

        None where the tensors had better be sent.
        """
        with self._lock:
            files = self._files()
        return (files, files.addresses()) if files is not None else None

    def open(self, allow: AllowList) -> Any:
        """The object, as one of the caller's own.

        Raises:
            UntrustedTypeError: it names a type outside the allow-list.
            SerializationError: it cannot be read.
            OSError: there is no memory for it.
        """
        with self._lock:
            if self.num_openings is not None:
                self.num_openings -= 1
            is_last = self._files() is None and self.num_openings == 0
            parcel = self._parcel if is_last else self._copy()
        return parcel.open(allow)

    def equals(self, obj: Any) -> bool:
        """Whether an object, as it is now, is the same to the last bit; False where that cannot be told cheaply.

        Raises:
            SerializationError: it cannot be sent.
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
    """The values that a parcel refers to."""
    if not isinstance(parcel, Parcel) or not parcel.apart:
        return ()
    return tuple(value for value in parcel.apart if isinstance(value, SharedValue))


def _have_equal_bytes(ours: Tensor, theirs: Tensor) -> bool:
    if (ours.dtype, ours.shape, ours.stride()) != (theirs.dtype, theirs.shape, theirs.stride()):
        return False
    if ours.is_cuda or theirs.is_cuda:
        return False
    unit = np.uint8 if ours.nbytes % 8 else np.uint64  # as fast as the C library's memcmp
    return np.array_equal(np.frombuffer(memory_of(ours), unit), np.frombuffer(memory_of(theirs), unit))
