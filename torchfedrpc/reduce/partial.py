"""Reducers and partial results on their way: those of a bundled reducer as plain data, others as pickled objects."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from torchfedrpc.errors import SerializationError
from torchfedrpc.reduce.reducers import Entry, Mean, Reducer, Sum, WeightedMean, is_builtin
from torchfedrpc.reduce.tree import Node
from torchfedrpc.wire.allowlist import AllowList
from torchfedrpc.wire.packing import Packed, Parcel, Reference, pack
from torchfedrpc.wire.tensors import dtype_named, is_plain, name_of_dtype

# The entries of a reducer travel in their structure, each as (form, total): form is the number of its dtype among
# those of the parcel, below 0 for Python numbers; total is the number of a tensor beside the data. A Python number,
# or a tensor that is not plain dense CPU memory, stands there itself. A tuple of entries is a list in a tuple.
_NUMBER = -1
_MAX_DEPTH = 200  # levels of dicts, lists and tuples

_KINDS = {"Mean": Mean, "Sum": Sum}


def pack_reducer(reducer: Reducer) -> Parcel:
    """Take the present state of an empty reducer."""
    if is_builtin(reducer) and reducer._entries is None:  # type: ignore[attr-defined]
        return pack((type(reducer).__name__, reducer.value, getattr(reducer, "weight", None)))  # type: ignore[attr-defined]
    return pack(reducer)


def open_reducer(parcel: Packed, allow: AllowList, device: torch.device | None = None) -> Reducer:
    """Return the reducer of a parcel, with its tensors of GPUs on ``device`` if that is given."""
    match parcel.open(allow, device=device):
        case ("WeightedMean", value, weight):
            return WeightedMean(value, weight)
        case ("Mean" | "Sum" as kind, value, None):
            return _KINDS[kind](value)
        case reducer:
            own: Reducer = reducer
            return own


def pack_nodes(nodes: list[Node]) -> Parcel:
    """Pack partial results of one reducer. The parcel has a bundled reducer's memory, which is not used again."""
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
    """
    tensors: list[Tensor | None] = []
    data: Any = parcel.open(allow, tensors)  # type: ignore[arg-type]
    try:
        if isinstance(parcel, Reference) or (type(data) is list and not is_builtin(reducer)):  # of objects
            return [_node(*node) for node in data]
        if type(data) is not tuple or [*map(type, data)] != [list, list]:  # another type could run code of its class
            raise TypeError
        forms, parts = data
        if {*map(type, forms), *map(type, parts)} - {tuple}:
            raise TypeError
        known = []
        for name, is_array in forms:
            if type(is_array) is not bool:
                raise TypeError
            known.append((dtype_named(name), is_array))
        nodes: list[Node] = []
        seen: set[int] = set()
        for level, index, weight, num_sums, entries in parts:
            if {type(level), type(index), type(num_sums)} != {int} or type(weight) not in (int, float):
                raise TypeError
            state: Any = copy.copy(reducer)
            state._weight, state._num_sums = weight, num_sums
            state._entries = None if entries is None else _together(entries, known, tensors, seen, _MAX_DEPTH)
            nodes.append((level, index, state))
        return nodes
    except (TypeError, ValueError, LookupError, AttributeError):
        raise SerializationError("partial results came in a form that this version does not send") from None


def _node(level: Any, index: Any, reducer: Any) -> Node:
    if {type(level), type(index)} != {int}:
        raise TypeError
    return level, index, reducer


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


def _together(
    parts: Any, forms: Sequence[tuple[Any, bool]], tensors: list[Tensor | None], seen: set[int], depth: int
) -> Any:
    """Return the entries that `_apart` took apart, within a time that is bounded by their size.

    Args:
        parts: From `_apart`.
        forms: The dtypes, and whether the result is an array.
        tensors: Tensors beside the data; replaced by None where they are used.
        seen: Ids of the parts so far, each of which is used once.
        depth: Number of levels that may follow.

    Raises:
        TypeError: If the parts are of another form.
        ValueError: If they are nested too deep, or a part comes twice.
    """
    kind = type(parts)
    if kind is dict or kind is list:
        if not depth or id(parts) in seen:
            raise ValueError
        seen.add(id(parts))
        if kind is dict:
            return {key: _together(item, forms, tensors, seen, depth - 1) for key, item in parts.items()}
        return [_together(item, forms, tensors, seen, depth - 1) for item in parts]
    if kind is not tuple:  # another type could run code of its class
        raise TypeError
    if len(parts) == 1:
        if type(parts[0]) is not list:
            raise TypeError
        return tuple(_together(parts[0], forms, tensors, seen, depth))
    form, total = parts
    if type(form) is not int:
        raise TypeError
    if form == _NUMBER:
        if type(total) not in (int, float, complex):
            raise TypeError
        return Entry(total)
    if type(total) is int:
        number, total = total, tensors[total]
        tensors[number] = None
    elif id(total) in seen:
        raise ValueError
    else:
        seen.add(id(total))
    if type(total) is not Tensor:
        raise TypeError
    return Entry(total, *forms[form])
