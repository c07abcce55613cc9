"""Second objects of plain structures, dicts, lists and tuples with dense tensors: without a pickle between."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

from torch import Tensor

from torchfedrpc.wire.tensors import PlainTensors, is_plain

_ATOMS = (type(None), bool, int, float, complex, str, bytes)


def is_plain_structure(obj: Any) -> bool:
    """Whether `twin` can make a second one: nothing is in it twice, and its tensors are no more than their values."""
    seen: set[int] = set()
    todo = [obj]
    while todo:
        part = todo.pop()
        kind = type(part)
        if kind in _ATOMS:
            continue
        if kind is Tensor:
            if part.requires_grad or part.__dict__ or not is_plain(part):
                return False
            storage = part.untyped_storage()
            if storage.nbytes() != part.nbytes:  # a twin would lie otherwise in memory
                return False
            places = {id(part), storage._cdata}
        elif kind in (dict, OrderedDict):
            if not all(type(key) in _ATOMS for key in part):
                return False
            places = {id(part)}
            todo += [*part.values(), *getattr(part, "__dict__", {}).values()]
        elif kind in (list, tuple):
            places = {id(part)} if part != () else set()
            todo += part
        else:
            return False
        if places & seen:
            return False
        seen |= places
    return True


def twin(obj: Any) -> Any:
    """Another object of the same value, on memory of its own."""
    with PlainTensors():
        return _twin(obj)


def _twin(obj: Any) -> Any:
    kind = type(obj)
    if kind is Tensor:
        return obj.clone()
    if kind is dict:
        return {key: _twin(item) for key, item in obj.items()}
    if kind is OrderedDict:
        other = OrderedDict((key, _twin(item)) for key, item in obj.items())
        other.__dict__.update({name: _twin(item) for name, item in obj.__dict__.items()})
        return other
    if kind in (list, tuple):
        return kind(map(_twin, obj))
    return obj
