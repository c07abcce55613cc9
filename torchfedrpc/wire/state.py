"""How an object from a pickle gets its state: as pickle does it, where the object is the pickle's own."""

from __future__ import annotations

import enum
import sys
import types
from typing import Any

import numpy as np

from torchfedrpc.errors import SerializationError, UntrustedTypeError
from torchfedrpc.wire.arrays import ArrayClass, check_generator, is_generator, set_array_state, set_dtype_state

# The whole process has these in common, so a message may not change them.
_COMMON = (
    type,
    enum.Enum,
    types.ModuleType,
    types.FunctionType,
    types.BuiltinFunctionType,
    types.MethodType,
    ArrayClass,
)


def set_state(obj: Any, state: Any) -> None:
    """Give an object its state, by ``__setstate__`` or as attributes.

    Args:
        obj: what the pickle has made.
        state: as ``__getstate__`` gave it.

    Raises:
        UntrustedTypeError: a class, a function or the like, which others use as well.
        SerializationError: a state that its type cannot have.
    """
    if isinstance(obj, _COMMON):
        name = getattr(obj, "__qualname__", None) or type(obj).__qualname__
        raise UntrustedTypeError(
            f"a pickle sets attributes of {name}, which all of this process has in common: send instances, and set "
            f"what belongs to the class in its module"
        )
    if isinstance(obj, np.ndarray):
        set_array_state(obj, state)
    elif isinstance(obj, np.dtype):
        set_dtype_state(obj, state)
    elif (setstate := getattr(obj, "__setstate__", None)) is not None:
        setstate(state)
        if is_generator(obj):
            check_generator(obj)
    else:
        _set_attributes(obj, state)


def _set_attributes(obj: Any, state: Any) -> None:
    attributes, slots = state if isinstance(state, tuple) and len(state) == 2 else (state, None)
    for part in (attributes, slots):
        if part and not isinstance(part, dict):
            raise SerializationError(f"the state of a {type(obj).__qualname__} is a {type(part).__qualname__}")
    if attributes:
        own = obj.__dict__
        for name, value in attributes.items():
            own[sys.intern(name) if type(name) is str else name] = value
    for name, value in (slots or {}).items():
        setattr(obj, name, value)
