"""Exceptions as plain parts, and back: type, args and attributes, never through their own ``__reduce__``."""

from __future__ import annotations

import builtins
from typing import Any

from torchfedrpc.errors import SerializationError

# What builtin exceptions keep outside ``args`` and ``__dict__`` and a caller may look at.
_C_ATTRIBUTES = ("filename", "filename2", "name", "path")


def exception_state(error: BaseException) -> dict[str, Any]:
    """The attributes of an exception beside its args, notes included."""
    state = dict(error.__dict__)
    for name in _C_ATTRIBUTES:
        owner = next((cls for cls in type(error).__mro__ if name in vars(cls)), None)
        if owner is not None and vars(builtins).get(owner.__name__) is owner:
            value = getattr(error, name)
            if isinstance(value, str):
                state[name] = value
    return state


def rebuild_exception(cls: Any, args: tuple[Any, ...], state: dict[str, Any]) -> BaseException:
    """An exception of that type with those args and attributes; a user's ``__init__`` does not run.

    Raises:
        SerializationError: ``cls`` is no exception type.
    """
    if not (isinstance(cls, type) and issubclass(cls, BaseException)):
        raise SerializationError(f"{cls!r} is not a type of exception")
    # Some builtins (UnicodeDecodeError) are empty when made without their constructor.
    is_builtin = vars(builtins).get(cls.__name__) is cls
    error: BaseException = cls(*args) if is_builtin else cls.__new__(cls, *args)
    for name, value in state.items():
        setattr(error, name, value)
    return error
