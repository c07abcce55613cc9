"""The rules by which a pickle may call, make and change objects, one for each of the opcodes that do so.

Only the pickle's own objects change, and only in the way in which pickling wrote them: items go into dicts, lists and
sets by the methods of these types, attributes into the ``__dict__`` and the slots of instances. Of code that the
sender can choose, nothing runs but constructors, ``__setstate__``, ``__hash__`` and ``__eq__`` of classes of trusted
packages, and the container methods of those that are containers of no builtin type.
"""

from __future__ import annotations

import sys
import types
from collections import OrderedDict, defaultdict, deque
from typing import Any

from torchfedrpc.errors import SerializationError, UntrustedTypeError
from torchfedrpc.wire.allowlist import AllowList
from torchfedrpc.wire.scan import (
    ADDITEMS,
    APPEND,
    APPENDS,
    BUILD,
    FROZENSET,
    NEWOBJ,
    REDUCE,
    SETITEM,
    SETITEMS,
)

_MAX_KEY_PARTS = 10_000
"""Parts of a key, those of parts included, each as often as it occurs: hashing visits them all. A few nested tuples
that hold each other twice have 2**40."""
_CHECKED_KEYS = 1024  # collisions of fewer keys cost no more than milliseconds
_MIN_HASHES = 8  # the keys may share their hashes by so many each: 40,000 keys of one hash take 8 seconds


def reduce(allow: AllowList, function: Any, arguments: Any) -> Any:
    """Call what a pickle calls.

    Raises:
        UntrustedTypeError: If it may not be called.
        SerializationError: If its arguments are none that pickling gives it.
    """
    if type(arguments) is not tuple:
        raise SerializationError("a pickle calls a function without a tuple of arguments")
    return allow.constructor(function)(*arguments)


def new(allow: AllowList, cls: Any, arguments: Any, keywords: Any) -> Any:
    """Make an instance without calling its constructor, as pickling does.

    Raises:
        UntrustedTypeError: If the class may have no instances from a pickle.
        SerializationError: If its arguments are none that pickling gives it.
    """
    if type(arguments) is not tuple or type(keywords) is not dict:
        raise SerializationError("a pickle makes an object without a tuple of arguments")
    if not allow.may_have_instances(cls) or ((arguments or keywords) and not allow.is_trusted(cls)):
        raise UntrustedTypeError(f"a pickle makes a {_name(cls)} in a way in which none is pickled")
    return cls.__new__(cls, *arguments, **keywords)


def set_state(allow: AllowList, obj: Any, state: Any) -> Any:
    """Give an instance its state, by ``__setstate__`` or as attributes; return it.

    Raises:
        UntrustedTypeError: If it is a class, a function or the like, which others use as well.
        SerializationError: If it is a state that its type cannot have.
    """
    if not allow.may_have_state(type(obj)):
        raise UntrustedTypeError(
            f"a pickle sets attributes of {_name(obj)}, which all of this process has in common: send instances, and "
            f"set what belongs to the class in its module"
        )
    if (setstate := getattr(obj, "__setstate__", None)) is not None:
        setstate(state)
    else:
        _set_attributes(obj, state)
    return obj


def add_items(allow: AllowList, container: Any, items: tuple[Any, ...]) -> Any:
    """Append items to a list, or to another container that pickling treats as one; return it.

    Raises:
        UntrustedTypeError: If it is none.
    """
    if isinstance(container, list):
        list.extend(container, items)
    elif isinstance(container, deque):
        deque.extend(container, items)
    elif allow.is_trusted(type(container)):
        for item in items:
            container.append(item)
    else:
        raise _no_container(container, "list")
    return container


def add_members(container: Any, items: tuple[Any, ...]) -> Any:
    """Add members to a set; return it.

    Raises:
        UntrustedTypeError: If it is none.
        SerializationError: If hashing them would take too long.
    """
    if type(container) is not set:
        raise _no_container(container, "set")
    _check_keys(items)
    container.update(items)
    _check_growth(container, len(items))
    return container


def frozen_set(items: tuple[Any, ...]) -> frozenset[Any]:
    """Make a frozenset.

    Raises:
        SerializationError: If hashing its members would take too long.
    """
    _check_keys(items)
    return frozenset(items)


def set_items(allow: AllowList, container: Any, items: tuple[Any, ...]) -> Any:
    """Put items into a dict, or into another container that pickling treats as one; return it.

    Args:
        allow: the types that may travel.
        container: the dict.
        items: keys and values in turn.

    Raises:
        UntrustedTypeError: If it is no dict.
        SerializationError: If hashing the keys would take too long.
    """
    if len(items) % 2:
        raise SerializationError("a pickle puts a key without a value into a dict")
    keys, values = items[::2], items[1::2]
    _check_keys(keys)
    if type(container) is dict or type(container) is defaultdict:
        container.update(zip(keys, values, strict=True))
        if len(container) > _CHECKED_KEYS:
            _check_growth(container, len(keys))
    elif isinstance(container, dict):  # not by a method of a subclass, which may store something else
        put = OrderedDict.__setitem__ if isinstance(container, OrderedDict) else dict.__setitem__
        for key, value in zip(keys, values, strict=True):
            put(container, key, value)
        _check_growth(container, len(keys))
    elif allow.is_trusted(type(container)):
        for key, value in zip(keys, values, strict=True):
            container[key] = value
    else:
        raise _no_container(container, "dict")
    return container


def answer(allow: AllowList, target: Any, argument: Any, op: int) -> Any:
    """Carry out one of the requests of `scan.with_requests`, other than of parts that the parcel itself has.

    Raises:
        UntrustedTypeError: As of the rule for that opcode.
        SerializationError: As of the rule for that opcode.
    """
    if op in (SETITEM, SETITEMS):
        return set_items(allow, target, argument)
    if op == APPENDS:
        return add_items(allow, target, argument)
    if op == APPEND:
        return add_items(allow, target, (argument,))
    if op == REDUCE:
        return reduce(allow, target, argument)
    if op == NEWOBJ:
        return new(allow, target, argument, {})
    if op == BUILD:
        return set_state(allow, target, argument)
    if op == ADDITEMS:
        return add_members(target, argument)
    if op == FROZENSET:
        return frozen_set(target)
    arguments, keywords = argument
    return new(allow, target, arguments, keywords)


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
        slot = getattr(type(obj), name, None)
        if not isinstance(slot, types.MemberDescriptorType):  # a property could do anything
            raise SerializationError(
                f"the state of a {type(obj).__qualname__} has {name!r}, which is none of its slots"
            )
        slot.__set__(obj, value)


def _check_keys(keys: tuple[Any, ...]) -> None:
    """Check that hashing the keys takes no longer than their bytes justify."""
    if not set(map(type, keys)) <= _SIMPLE_KEYS:
        for key in keys:
            _check_parts(key)
    if len(keys) > _CHECKED_KEYS:
        _check_hashes(keys)


_BY_IDENTITY: Any = object.__hash__
_SIMPLE_KEYS = frozenset((str, int, float, bytes, bool, type(None)))


def _check_parts(key: Any) -> None:
    num_parts, todo = 0, [key]
    while todo:
        part = todo.pop()
        num_parts += 1
        if num_parts > _MAX_KEY_PARTS:
            raise SerializationError(
                f"a key of a dict or set has more than {_MAX_KEY_PARTS} parts: use a shorter one"
            )
        if isinstance(part, tuple | frozenset):
            todo += part
        elif type(part) not in _SIMPLE_KEYS and type(part).__hash__ is not _BY_IDENTITY:
            todo += getattr(
                part, "__dict__", {}
            ).values()  # of a class of a trusted package, whose hash may be theirs


def _check_growth(container: Any, num_added: int) -> None:
    size = len(container)
    if size > _CHECKED_KEYS and size.bit_length() > (size - min(num_added, size)).bit_length():  # grown twofold
        _check_hashes(tuple(container))


def _check_hashes(keys: tuple[Any, ...]) -> None:
    if len(set(map(hash, keys))) * _MIN_HASHES < len(set(map(id, keys))):
        raise SerializationError("the keys of a dict or set have too few different hashes: use other keys")


def _no_container(container: Any, kind: str) -> UntrustedTypeError:
    return UntrustedTypeError(f"a pickle changes {_name(container)} as if it were a {kind}")


def _name(obj: Any) -> str:
    name = getattr(obj, "__qualname__", None)
    return name if isinstance(name, str) else f"a {type(obj).__qualname__}"
