"""Reducers and partial results on their way: those of a bundled reducer as plain data, others as pickled objects."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from torchfedrpc.errors import SerializationError
from torchfedrpc.reduce.reducers import Entry, Mean, Reducer, Sum, WeightedMean, is_builtin
from torchfedrpc.reduce.tree import Node
from torchfedrpc.wire.allowlist import AllowList
from torchfedrpc.wire.packing import Packed, Parcel, pack
from torchfedrpc.wire.tensors import dtype_named, is_plain, name_of_dtype

# The entries of a reducer travel in their structure, each as (form, total): form is the number of its dtype among
# those of the parcel, below 0 for Python numbers; total is the number of a tensor beside the data. A Python number,
# or a tensor that is not plain dense CPU memory, stands there itself. A tuple of entries is a list in a tuple.
_NUMBER = -1

_KINDS = {"Mean": Mean, "Sum": Sum}


def pack_reducer(reducer: Reducer) -> Parcel:
    """Take the present state of an empty reducer.

    Raises:
        SerializationError: If it cannot be sent.
    """
    if is_builtin(reducer) and reducer._entries is None:  # type: ignore[attr-defined]
        return pack((type(reducer).__name__, reducer.value, getattr(reducer, "weight", None)))  # type: ignore[attr-defined]
    return pack(reducer)


def open_reducer(parcel: Packed, allow: AllowList) -> Reducer:
    """Return the reducer of a parcel.

    Raises:
        SerializationError: If it cannot be read.
    """
    match parcel.open(allow):
        case ("WeightedMean", value, weight):
            return WeightedMean(value, weight)
        case ("Mean" | "Sum" as kind, value, None):
            return _KINDS[kind](value)
        case reducer:
            own: Reducer = reducer
            return own


def pack_nodes(nodes: list[Node]) -> Parcel:
    """Take partial results of one reducer. The parcel has the memory of a bundled reducer, which is not used again.

    Raises:
        SerializationError: If they cannot be sent.
    """
    if not all(is_builtin(reducer) for _, _, reducer in nodes):
        return pack(nodes)
    forms: dict[tuple[str, bool], int] = {}
    tensors: list[Tensor] = []
    parts = []
    for level, index, reducer in nodes:
        state: Any = reducer
        parts.append((level, index, state._weight, state._num_sums, _apart(state._entries, forms, tensors)))
    return pack((list(forms), parts), copy=False, beside=tensors)


def open_nodes(parcel: Packed, reducer: Reducer, allow: AllowList) -> list[Node]:
    """Return the partial results of a parcel.

    Args:
        parcel: From `pack_nodes`.
        reducer: An empty reducer.
        allow: The types that may travel.

    Raises:
        SerializationError: If they cannot be read.
    """
    tensors: list[Tensor] = []
    data: Any = parcel.open(allow, tensors)
    if type(data) is list:  # of objects
        return data
    try:
        forms, parts = data
        known = [(dtype_named(name), bool(is_array)) for name, is_array in forms]
        nodes: list[Node] = []
        for level, index, weight, num_sums, entries in parts:
            state: Any = copy.copy(reducer)
            state._weight, state._num_sums = weight, num_sums
            state._entries = _together(entries, known, tensors)
            nodes.append((level, index, state))
        return nodes
    except (TypeError, ValueError, LookupError, AttributeError):
        raise SerializationError("partial results came in a form that this version does not send") from None


def _apart(entries: Any, forms: dict[tuple[str, bool], int], tensors: list[Tensor]) -> Any:
    if isinstance(entries, Entry):
        if entries.dtype is None:
            return _NUMBER, entries.total
        form = forms.setdefault((name_of_dtype(entries.dtype), entries.is_array), len(forms))
        if not is_plain(entries.total):
            return form, entries.total
        tensors.append(entries.total)
        return form, len(tensors) - 1
    if isinstance(entries, dict):
        return {key: _apart(item, forms, tensors) for key, item in entries.items()}
    if isinstance(entries, list | tuple):
        items = [_apart(item, forms, tensors) for item in entries]
        return items if isinstance(entries, list) else (items,)
    return entries


def _together(parts: Any, forms: Sequence[tuple[Any, bool]], tensors: Sequence[Tensor]) -> Any:
    match parts:
        case dict():
            return {key: _together(item, forms, tensors) for key, item in parts.items()}
        case list():
            return [_together(item, forms, tensors) for item in parts]
        case (items,):
            return tuple(_together(item, forms, tensors) for item in items)
        case (int(form), total):
            if form == _NUMBER:
                return Entry(total)
            return Entry(total if isinstance(total, Tensor) else tensors[total], *forms[form])
    return parts
