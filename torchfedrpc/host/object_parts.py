"""What Python objects consist of: their value, their slots, what they give to pickle, what they refer to."""

from __future__ import annotations

import copyreg
import enum
import gc
import reprlib
import struct
import sys
import types
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor

ATOMS = frozenset((type(None), bool, int, float, complex, str, bytes, type(...)))
BY_IDENTITY: tuple[Any, ...] = (
    type,
    type(NotImplemented),
    types.FunctionType,
    types.ModuleType,
    types.GenericAlias,
    np.ufunc,
    torch.dtype,
    torch.layout,
    torch.memory_format,
    torch.qscheme,
)
CONSTANTS = ATOMS | {type, types.FunctionType, types.BuiltinFunctionType, torch.dtype}
_FOUNDATIONS = sys.stdlib_module_names | {"builtins", "torch", "numpy"}

UNSET: Any = object()
"""Stands for an attribute that is not there."""


def plain_value(obj: Any) -> Any:
    """The number, text or bytes that an instance of a subclass is."""
    if isinstance(obj, bytes | bytearray):
        return bytes(memoryview(obj))
    base: Any = next(base for base in (int, float, complex, str) if isinstance(obj, base))
    return base(*base.__getnewargs__(obj))


def reduced(obj: Any) -> tuple[Any, ...]:
    """What an object gives to pickle, its iterators as lists."""
    reduce = copyreg.dispatch_table.get(type(obj))
    parts: Any = reduce(obj) if reduce is not None else obj.__reduce_ex__(5)
    if isinstance(parts, str):
        return (parts,)
    return tuple(list(part) if place in (3, 4) and part is not None else part for place, part in enumerate(parts))


def reachable(root: Any, owner: Any) -> Iterable[Any]:
    """All objects that a root refers to, but for classes, modules, and what functions know of their modules."""
    seen = {id(root), id(owner)}
    todo = [root]
    while todo:
        part = todo.pop()
        kind = type(part)
        if kind in ATOMS or isinstance(part, type | types.ModuleType | types.CodeType | types.FrameType):
            continue
        yield part
        if kind is types.FunctionType:
            following = list(part.__closure__ or ())  # cells, whose referents are their contents
        elif isinstance(part, Tensor):
            following = [part.__dict__, part.grad] if part.is_leaf else [part.__dict__]
        else:
            following = gc.get_referents(part)
        for one in following:
            if id(one) not in seen:
                seen.add(id(one))
                todo.append(one)


def has_stable_hash(obj: Any) -> bool:
    """Whether an object's hash is the same in every process, so that sets of such objects have an order."""
    if type(obj) in (tuple, frozenset):
        return all(map(has_stable_hash, obj))
    return type(obj) in (bool, int, float, complex)


def is_found_by_value(obj: Any) -> bool:
    """Whether a set or dict finds an object by its value, and not by its address."""
    kind = type(obj)
    if kind in CONSTANTS or isinstance(obj, (*BY_IDENTITY, enum.Enum)):
        return True
    if isinstance(obj, tuple | frozenset):
        return all(map(is_found_by_value, obj))
    return has_value(kind)


def has_plain_state(obj: Any) -> bool:
    """Whether an object without a say in how it is pickled has no state but its attributes and slots."""
    try:
        object.__reduce_ex__(obj, 5)
    except TypeError:  # a C type, which has more
        return False
    return True


def has_value(kind: type) -> bool:
    """Whether instances are hashed by their value, so that it does not matter which object one is."""
    own_hash: Any = kind.__hash__
    return own_hash is not None and own_hash is not object.__hash__ and not issubclass(kind, Tensor)


def bits_of(value: Any) -> Any:
    """A number as what is equal for equal bits alone; anything else as it is."""
    if type(value) is float:
        return struct.pack("<d", value)
    if type(value) is complex:
        return struct.pack("<dd", value.real, value.imag)
    return value


def slots_of(kind: type) -> list[Any]:
    """The descriptors of a class's slots."""
    return [
        member
        for base in kind.__mro__
        if "__slots__" in vars(base)
        for member in vars(base).values()
        if isinstance(member, types.MemberDescriptorType)
    ]


def get(descriptor: Any, obj: Any) -> Any:
    """What an object has in a slot or field."""
    try:
        return descriptor.__get__(obj, type(obj))
    except AttributeError:
        return UNSET


def root_of(cls: type) -> str:
    """The top-level package that defines a class."""
    return str(cls.__module__).partition(".")[0]


def is_foundation(cls: type) -> bool:
    """Whether a class is Python's, torch's or numpy's."""
    return root_of(cls) in _FOUNDATIONS and cls.__module__ != "__main__"


def name_of(obj: Any) -> str:
    """What to call a function or class in a message."""
    name = getattr(obj, "__qualname__", None) or getattr(obj, "__name__", None)
    return f"{getattr(obj, '__module__', '')}.{name}" if name else reprlib.repr(obj)
