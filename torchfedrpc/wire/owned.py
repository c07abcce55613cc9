"""What of a value nobody else can hold: it may be sent as it is, where all else is owed a copy."""

from __future__ import annotations

import functools
import sys
import weakref
from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor

from torchfedrpc.wire.tensors import ALIGNMENT_BYTES, SMALL_BYTES, is_plain

_CONTAINERS = (dict, list, tuple, OrderedDict)

# How many refer to a tensor in Python and in C++, and to its storage in Python and in C++.
_Holders = tuple[int, int, int, int]

_tensor_uses: Any = getattr(Tensor, "_use_count", None)
_storage_uses: Any = getattr(torch._C, "_storage_Use_Count", None)
_shares_lazily: Any = getattr(torch._C, "_is_cow_tensor", None)


def owned_storages(box: list[Any]) -> frozenset[int]:
    """The addresses of those storages that nothing can reach but through a box.

    Found are the storages of tensors, not of small ones, in dicts, lists and tuples within each other in the box,
    where nobody else refers to any of these, in Python or in C++, nor to the memory by whatever it was shared with.
    In doubt a storage is left out.

    The caller has to put an object into the box before any variable refers to it, ``box = [method()]``, and to hand
    the box on instead of the object: a reference from a variable counts as somebody else's, and costs a copy. The
    answer holds until other code gets at the box or its content, so whoever acts on it does so at once, and leaves
    the tensors alone from then on.

    Args:
        box: a list of objects; how many refer to the list itself does not matter.
    """
    owned: set[int] = set()
    boxes: list[Any] = [box] if _can_tell() else []
    while boxes:
        outer = boxes.pop()
        content = list(outer.values() if isinstance(outer, dict) else outer)
        inner = [part for part in content if type(part) in _CONTAINERS]
        tensors = [part for part in content if type(part) is Tensor and is_plain(part) and part.nbytes > SMALL_BYTES]
        del content  # it refers to them, too
        fresh = _holders_of_fresh()
        # Counted first: where nobody else holds a thing, nobody is left who could change what is looked at next.
        boxes += [
            part
            for part, references in zip(inner, _references(inner), strict=True)
            if references == fresh[0] and not weakref.getweakrefcount(part)
        ]
        owned.update(
            tensor.untyped_storage()._cdata
            for tensor, holders in zip(tensors, _holders(tensors), strict=True)
            if holders == fresh and _is_ordinary(tensor)
        )
    return frozenset(owned)


def _references(parts: list[Any]) -> list[int]:
    return list(map(sys.getrefcount, parts))


def _holders(tensors: list[Tensor]) -> list[_Holders]:
    storages = [tensor.untyped_storage() for tensor in tensors]
    addresses = [storage._cdata for storage in storages]
    counts = zip(
        map(sys.getrefcount, tensors),
        map(_tensor_uses, tensors),
        map(sys.getrefcount, storages),
        map(_storage_uses, addresses),
        strict=True,
    )
    return list(counts)  # one step for Python: no other thread makes one kind of reference of another meanwhile


@functools.cache
def _holders_of_fresh() -> _Holders:
    box = [torch.empty(1, device="cpu")]
    tensors = list(box)
    return _holders(tensors)[0]


def _is_ordinary(tensor: Tensor) -> bool:
    """Whether a tensor that nobody else holds is no more than its values, in memory of torch's own making."""
    storage = tensor.untyped_storage()
    return not (
        tensor.requires_grad
        or _shares_lazily(tensor)
        or weakref.getweakrefcount(tensor)
        or weakref.getweakrefcount(storage)
        or not storage.resizable()  # numpy has had a look, or it is a file's, or somebody's buffer
        or storage.is_shared()  # another process may have it
        or tensor.is_pinned()
        or tensor.data_ptr() % ALIGNMENT_BYTES
    )


def _can_tell() -> bool:
    """Whether this torch and this Python count references in a way that can be relied on."""
    counted = None not in (_tensor_uses, _storage_uses, _shares_lazily)
    has_gil: bool = getattr(sys, "_is_gil_enabled", lambda: True)()
    return counted and has_gil
