"""Exceptions as plain parts, and back: type, args and attributes, never through their own ``__reduce__``."""

from __future__ import annotations

import builtins
import functools
import inspect
import types
from typing import Any

from torchfedrpc.errors import SerializationError

# Read-only, made of ``args``; and the object whose attribute was missing, which is the learner more often than not.
_NOT_STATE = frozenset(("message", "exceptions", "obj"))


def exception_args(error: BaseException) -> tuple[Any, ...]:
    """What a builtin base of the exception is made of."""
    if isinstance(error, BaseExceptionGroup):  # its args are those of a constructor that a subclass may have
        return error.message, list(error.exceptions)
    return error.args


def exception_state(error: BaseException) -> dict[str, Any]:
    """The attributes of an exception beside its args: those in its ``__dict__`` (notes too), in slots, and in C."""
    state = {}
    for cls in type(error).__mro__:
        slots = vars(cls).get("__slots__", ())
        for name in (slots,) if isinstance(slots, str) else slots:
            private = name.startswith("__") and not name.endswith("__")
            name = f"_{cls.__name__.lstrip('_')}{name}" if private else name
            if name not in ("__dict__", "__weakref__") and hasattr(error, name):
                state[name] = getattr(error, name)
    base: Any = _builtin_base(type(error))
    for name in _kept_in_c(base):
        if (value := getattr(error, name, None)) is not None:
            state[name] = value
    return state | error.__dict__


def rebuild_exception(cls: Any, args: tuple[Any, ...], state: dict[str, Any]) -> BaseException:
    """An exception of that type with those args and attributes; no constructor of a user's runs.

    Raises:
        SerializationError: ``cls`` is no exception type.
    """
    if not (isinstance(cls, type) and issubclass(cls, BaseException)):
        raise SerializationError(f"a {type(cls).__qualname__} is not a type of exception")
    if type(args) is not tuple or type(state) is not dict:
        raise SerializationError(f"a {cls.__qualname__} came without its arguments and attributes")
    base: Any = _builtin_base(cls)
    error: BaseException = base.__new__(cls, *args)
    base.__init__(error, *args)  # some builtins keep nothing of what __new__ is given
    for name, value in state.items():
        if type(name) is not str or (name.startswith("__") and name != "__notes__"):
            shown = name if type(name) is str else f"a {type(name).__qualname__}"  # a sender's repr can be endless
            raise SerializationError(f"an exception came with {shown} among its attributes")
        if name == "__notes__" and not isinstance(value, list):
            continue  # anything that formats the exception would fail
        slot = inspect.getattr_static(cls, name, None)
        if isinstance(slot, types.GetSetDescriptorType) and name not in _kept_in_c(base):
            raise SerializationError(f"an exception came with {name} among its attributes")
        if isinstance(slot, types.MemberDescriptorType | types.GetSetDescriptorType):
            slot.__set__(error, value)
        else:  # past properties and a __setattr__ of the class, which could do anything
            error.__dict__[name] = value
    return error


@functools.cache
def _kept_in_c(base: type[BaseException]) -> tuple[str, ...]:
    """Return the attributes that a builtin exception keeps outside ``args`` and ``__dict__``."""
    return tuple(
        name
        for cls in base.__mro__
        for name, entry in vars(cls).items()
        if isinstance(entry, types.MemberDescriptorType | types.GetSetDescriptorType)
        and not name.startswith("_")
        and name not in _NOT_STATE
        and name != "args"
    )


def _builtin_base(cls: type[BaseException]) -> type[BaseException]:
    found: Any = next(base for base in cls.__mro__ if vars(builtins).get(base.__name__) is base)
    nearest: type[BaseException] = found
    return nearest
