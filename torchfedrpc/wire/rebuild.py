"""The rules by which a pickle may call, make and change objects: one rule for each opcode.

Only the pickle's own objects change, and only as pickling writes them: items go into dicts, lists and sets by the
methods of these types, attributes into the ``__dict__`` and the slots of instances. The only code that a sender can
choose are constructors, ``__setstate__``, ``__hash__`` and ``__eq__`` of classes of trusted packages, and
``append`` and ``__setitem__`` of their containers that derive from no builtin type.
"""

from __future__ import annotations

import sys
import types
import weakref
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterable
from decimal import Decimal
from fractions import Fraction
from typing import Any

import numpy as np
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

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

_MAX_KEY_PARTS = 1000
"""Nested parts of a key, each counted as often as it occurs, since hashing visits it as often. A few tuples that hold
each other twice have 2**40."""
_CHECKED_KEYS = 16  # collisions of fewer keys cost nothing
_MIN_HASHES = 8  # the keys may share their hashes by so many each: 40,000 keys of one hash take 8 seconds


class Budget:
    """Bounds what a pickle costs in time, memory and stack, in proportion to its size.

    Args:
        num_bytes: Size of the pickle and of the memory that came with it.
    """

    def __init__(self, num_bytes: int) -> None:
        self._left = (64 << 20) + 32 * num_bytes
        self._levels: dict[int, int] = {}  # by id, of nested objects whose freeing recurses
        self._inner: set[int] = set()  # ids of objects inside other objects
        self._num_late = 0

    def spend(self, amount: int) -> None:
        """Count so many bytes, or steps of about a nanosecond each.

        Raises:
            SerializationError: If the budget is exceeded.
        """
        self._left -= amount
        if self._left < 0:
            raise SerializationError("a pickle costs far more than its size: send what torchfedrpc packed")

    def nest(self, outer: Any, items: Iterable[Any]) -> None:
        """Count how deep objects lie directly in each other that CPython and numpy free by recursion in C.

        An object that takes items while it already lies in another makes that one deeper, too: such additions count
        as a level each.

        Raises:
            SerializationError: If they lie more than `_MAX_NESTED` deep, which could exhaust a thread's stack.
        """
        inner = [id(item) for item in items if _is_freed_by_recursion(item)]
        if not inner:
            return
        self._inner.update(inner)
        level = 1 + max(self._levels.get(number, 0) for number in inner)
        if level > self._levels.get(id(outer), 0):
            self._levels[id(outer)] = level
            self._num_late += id(outer) in self._inner
            if level + self._num_late > _MAX_NESTED:
                raise SerializationError(
                    f"a pickle nests arrays of objects, deques, defaultdicts or slices more than {_MAX_NESTED} deep: "
                    f"send lists of them"
                )


_MAX_NESTED = 600  # 3,000 nested arrays of objects exhaust a stack of 8 MB


def _is_freed_by_recursion(obj: Any) -> bool:
    """Return whether freeing it frees its content without the limit that CPython has for lists, tuples and dicts."""
    return type(obj) in (deque, defaultdict, slice) or (isinstance(obj, np.ndarray) and obj.dtype.hasobject)


def reduce(allow: AllowList, function: Any, arguments: Any, budget: Budget) -> Any:
    """Call a function or type that a pickle names.

    Raises:
        UntrustedTypeError: If it may not be called.
        SerializationError: If pickling never writes such arguments for it.
    """
    if type(arguments) is not tuple:
        raise SerializationError("a pickle calls a function without a tuple of arguments")
    if function is Counter and len(arguments) == 1 and type(arguments[0]) is dict:
        budget.spend(100 * len(arguments[0]))  # it is copied, and the pickle may name it many times
    budget.spend(1000)
    _check_builtin_arguments(function, arguments)
    made = allow.constructor(function, arguments)(*arguments)
    if type(made) is slice:
        budget.nest(made, arguments)
    return made


def new(allow: AllowList, cls: Any, arguments: Any, keywords: Any) -> Any:
    """Make an instance without calling its constructor, as pickling does.

    Raises:
        UntrustedTypeError: If the class may have no instances from a pickle.
        SerializationError: If pickling never writes such arguments for it.
    """
    if type(arguments) is not tuple or type(keywords) is not dict:
        raise SerializationError("a pickle makes an object without a tuple of arguments")
    if not allow.may_have_instances(cls) or ((arguments or keywords) and not allow.is_trusted(cls)):
        raise UntrustedTypeError(f"a pickle makes a {_name(cls)} in a way in which none is pickled")
    _check_builtin_arguments(cls, arguments)
    return cls.__new__(cls, *arguments, **keywords)


def _check_builtin_arguments(cls: Any, arguments: tuple[Any, ...]) -> None:
    """Check arguments that a trusted class may pass to a builtin base: a count or a range could make gigabytes."""
    if isinstance(cls, type) and issubclass(cls, _BUILTINS):
        for argument in arguments:
            is_count = type(argument) is int and issubclass(cls, bytes | bytearray)
            if is_count or isinstance(argument, range | Decimal | Fraction):
                raise SerializationError(f"a pickle makes a {cls.__qualname__} of a {type(argument).__qualname__}")


_BUILTINS = (list, tuple, set, frozenset, dict, bytes, bytearray, int, deque)


def set_state(allow: AllowList, obj: Any, state: Any, budget: Budget) -> Any:
    """Give an instance its state, by ``__setstate__`` or as attributes; return it.

    Raises:
        UntrustedTypeError: If it is a class, a function or the like, which the whole process shares.
        SerializationError: If its type cannot have such a state.
    """
    if (is_state := allow.state_check(type(obj))) is None:
        raise UntrustedTypeError(
            f"a pickle sets attributes of {_name(obj)}, which all of this process has in common: send instances, and "
            f"set what belongs to the class in its module"
        )
    for part in state if type(state) is tuple else (state,):
        budget.spend(200 * len(part) if type(part) in (dict, list, tuple) else 1000)
    if not is_state(state):
        raise SerializationError(f"the state of a {type(obj).__qualname__} is none that pickling writes")
    setstate: Any = getattr(type(obj), "__setstate__", None)  # not an attribute that the pickle has set
    if setstate is None:
        _set_attributes(obj, state)
    elif (setter := _setter_of_torchs(type(obj))) is not None:
        _check_attributes(obj, state)
        _check_shadows(obj, state)
        setter(obj, state)
    else:
        setstate(obj, state)
    return obj


def add_items(allow: AllowList, container: Any, items: tuple[Any, ...], budget: Budget) -> Any:
    """Append items to a list, or to another container that pickling treats as one; return it.

    Raises:
        UntrustedTypeError: If it is of another type.
    """
    if isinstance(container, list):
        list.extend(container, items)
    elif isinstance(container, deque):
        deque.extend(container, items)
        budget.nest(container, items)
    elif allow.is_trusted(type(container)):
        append = type(container).append
        for item in items:
            append(container, item)
    else:
        raise _no_container(container, "list")
    return container


def add_members(container: Any, items: tuple[Any, ...], budget: Budget) -> Any:
    """Add members to a set; return it.

    Raises:
        UntrustedTypeError: If it is of another type.
        SerializationError: If hashing them would take too long.
    """
    if type(container) is not set:
        raise _no_container(container, "set")
    can_collide = _check_keys(items, budget)
    container.update(items)
    if can_collide:
        _check_growth(container, len(items))
    return container


def frozen_set(items: tuple[Any, ...], budget: Budget) -> frozenset[Any]:
    """Make a frozenset.

    Raises:
        SerializationError: If hashing its members would take too long.
    """
    _check_keys(items, budget)
    return frozenset(items)


def set_items(allow: AllowList, container: Any, items: tuple[Any, ...], budget: Budget) -> Any:
    """Put items into a dict, or into another container that pickling treats as one; return it.

    Args:
        allow: The types that may travel.
        container: The dict.
        items: Keys and values in turn.
        budget: Counts the cost of hashing the keys.

    Raises:
        UntrustedTypeError: If it is no dict.
        SerializationError: If hashing the keys would take too long.
    """
    if len(items) % 2:
        raise SerializationError("a pickle puts a key without a value into a dict")
    keys, values = items[::2], items[1::2]
    can_collide = _check_keys(keys, budget)
    if type(container) is dict or type(container) is defaultdict:
        container.update(zip(keys, values, strict=True))
        if type(container) is defaultdict:
            budget.nest(container, values)
    elif isinstance(container, dict):  # not by a method of a subclass, which may store something else
        put = OrderedDict.__setitem__ if isinstance(container, OrderedDict) else dict.__setitem__
        for key, value in zip(keys, values, strict=True):
            put(container, key, value)
    elif allow.is_trusted(type(container)):
        put = type(container).__setitem__
        for key, value in zip(keys, values, strict=True):
            put(container, key, value)
        return container
    else:
        raise _no_container(container, "dict")
    if can_collide:
        _check_growth(container, len(keys))
    return container


def answer(allow: AllowList, budget: Budget, target: Any, argument: Any, op: int) -> Any:
    """Carry out a request of `scan.with_requests`.

    Raises:
        UntrustedTypeError: As of the rule for that opcode.
        SerializationError: As of the rule for that opcode.
    """
    if op in (SETITEM, SETITEMS):
        return set_items(allow, target, argument, budget)
    if op == APPENDS:
        return add_items(allow, target, argument, budget)
    if op == APPEND:
        return add_items(allow, target, (argument,), budget)
    if op == REDUCE:
        return reduce(allow, target, argument, budget)
    if op == NEWOBJ:
        return new(allow, target, argument, {})
    if op == BUILD:
        return set_state(allow, target, argument, budget)
    if op == ADDITEMS:
        return add_members(target, argument, budget)
    if op == FROZENSET:
        return frozen_set(target, budget)
    arguments, keywords = argument
    return new(allow, target, arguments, keywords)


def _setter_of_torchs(cls: type) -> Callable[[Any, Any], None] | None:
    """Return a setter for the state of a class whose ``__setstate__`` is torch's; None for other classes.

    Torch's own methods of some subclasses fill in attributes that old versions lacked, and read lists of any length.
    """
    owner = next(base for base in cls.__mro__ if "__setstate__" in vars(base))
    if not owner.__module__.startswith("torch."):
        return None
    if issubclass(cls, nn.RNNBase):
        return _set_recurrent
    if issubclass(cls, nn.Module):
        return _set_module
    return _set_optimizer if issubclass(cls, Optimizer) else _set_attributes


def _set_optimizer(optimizer: Any, state: dict[str, Any]) -> None:
    groups, parts = state.get("param_groups"), state.get("state")
    if (
        type(groups) is not list
        or not all(type(group) is dict and type(group.get("params")) is list for group in groups)
        or type(parts) not in (dict, defaultdict)
        or type(state.get("defaults")) is not dict
    ):
        raise SerializationError(f"the state of a {type(optimizer).__qualname__} has no groups of parameters")
    Optimizer.__setstate__(optimizer, state)
    _skip_handles(state)


def _check_shadows(obj: Any, state: dict[str, Any]) -> None:
    """Check that no attribute takes the place of a method: a caller of it would call an object of the sender's."""
    cls = type(obj)
    for name in state:
        if callable(getattr(cls, name, None)) and not (name == "step" and isinstance(obj, Optimizer)):
            raise SerializationError(f"the state of a {cls.__qualname__} has {name!r}, which is a method of it")


def _set_module(module: Any, state: dict[str, Any]) -> None:
    set_module: Any = nn.Module.__setstate__
    set_module(module, state)
    _skip_handles(state)


def _skip_handles(state: dict[str, Any]) -> None:
    """Reserve the numbers of hooks that arrived: a new hook of the same number would be removed together with it."""
    for name, hooks in state.items():
        if name.endswith("_hooks") and isinstance(hooks, dict) and hooks:
            highest = max((key for key in hooks if type(key) is int), default=0)
            RemovableHandle.next_id = max(RemovableHandle.next_id, highest + 1)


def _set_recurrent(module: Any, state: dict[str, Any]) -> None:
    _set_module(module, state)
    weights = state.get("_flat_weights")
    if type(weights) is not list or not all(weight is None or isinstance(weight, Tensor) for weight in weights):
        raise SerializationError(f"the state of a {type(module).__qualname__} has no weights")
    module._flat_weight_refs = [None if weight is None else weakref.ref(weight) for weight in weights]


def _check_attributes(obj: Any, state: Any) -> None:
    if type(state) is not dict or not all(type(name) is str for name in state):
        raise SerializationError(f"the state of a {type(obj).__qualname__} is no dict of attributes")


def _set_attributes(obj: Any, state: Any) -> None:
    attributes, slots = state if type(state) is tuple and len(state) == 2 else (state, None)
    for part in (attributes, slots):
        if part is not None:
            _check_attributes(obj, part)
    if attributes is not None:
        own = obj.__dict__
        for name, value in attributes.items():
            own[sys.intern(name)] = value
    for name, value in (slots or {}).items():
        slot = getattr(type(obj), name, None)
        if not isinstance(slot, types.MemberDescriptorType):  # a property could do anything
            raise SerializationError(
                f"the state of a {type(obj).__qualname__} has {name!r}, which is none of its slots"
            )
        slot.__set__(obj, value)


def _check_keys(keys: tuple[Any, ...], budget: Budget) -> bool:
    """Check that hashing and comparing the keys takes no longer than their bytes justify.

    Returns:
        Whether a sender can make their hashes equal; not if they are texts, whose hashes Python salts.
    """
    kinds = set(map(type, keys))
    if kinds <= _TEXTS:
        return False
    if not kinds <= _SIMPLE_KEYS:
        for key in keys:
            budget.spend(100 * _num_parts(key))
    if len(keys) > _CHECKED_KEYS:
        _check_hashes(keys)
    return True


_BY_IDENTITY: Any = object.__hash__
_TEXTS = frozenset((str, bytes, bool, type(None)))
_SIMPLE_KEYS = frozenset((str, int, float, bytes, bool, type(None)))


def _num_parts(key: Any) -> int:
    """Return how many parts hashing a key visits.

    Raises:
        SerializationError: If there are too many.
    """
    num_parts, todo = 0, [key]
    while todo:
        part = todo.pop()
        num_parts += 1
        if num_parts > _MAX_KEY_PARTS:
            raise SerializationError(f"a key of a dict or set has more than {_MAX_KEY_PARTS} parts: use a short one")
        if isinstance(part, tuple | frozenset):
            todo += part
        elif type(part) not in _SIMPLE_KEYS and type(part).__hash__ is not _BY_IDENTITY:
            todo += getattr(part, "__dict__", {}).values()  # a trusted class may hash its attributes
    return num_parts


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
