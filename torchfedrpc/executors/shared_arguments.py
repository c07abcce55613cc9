"""What calls have in common: placed on purpose by `LearnerProxy.share`, or recognised in the calls of one tick."""

from __future__ import annotations

import asyncio
import itertools
import weakref
from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.parameter import Parameter

from torchfedrpc.errors import SerializationError
from torchfedrpc.executors.admission import estimate
from torchfedrpc.host.answer import call_on
from torchfedrpc.wire.allowlist import AllowList
from torchfedrpc.wire.packing import Packed, SentApart, pack
from torchfedrpc.wire.shared import SharedValue

MIN_SHARED_BYTES = 16 << 10  # a smaller argument goes along with its call
_MAX_PARTS = 10_000  # of an object that is looked into; where it has more, comparing the bytes takes no longer
_NUMBERS = (type(None), bool, int, float, complex)
_TEXTS = (str, bytes)
TakeValue = Callable[[Any], Packed]

_numbers = itertools.count(1)  # of values, in this process


class SharedRef(SentApart):
    """An object that was placed once for all workers: as an argument of a call it arrives as the object.

    Each call has a copy of its own, which costs memory only where it is written. It is freed when this reference is
    dropped, or by `release`, once the calls that have it are through.
    """

    def __init__(self, value: SharedValue, sharing: Sharing) -> None:
        self._value: SharedValue | None = value
        self._sharing = sharing
        loop = asyncio.get_running_loop()
        self._release = weakref.finalize(self, call_on, loop, sharing.released, value)
        self._release.atexit = False

    @property
    def value(self) -> SharedValue:
        """What was placed.

        Raises:
            SerializationError: it was released, or the proxy that placed it is closed.
        """
        if not self._sharing.is_open:
            raise SerializationError(
                "this SharedRef is of a proxy that is closed: share the object again with the open one"
            )
        if self._value is None:
            raise SerializationError(
                "this SharedRef was released: share the object again with await proxy.share(obj)"
            )
        return self._value

    def open(self, allow: AllowList) -> Any:
        """The object, as one of the caller's own."""
        return self.value.open(allow)

    async def release(self) -> None:
        """Free the object on all workers, for whom calls that were submitted before still have it."""
        self._value = None
        self._release()

    def __reduce__(self) -> Any:
        raise SerializationError("a SharedRef is for the arguments of calls of its own proxy, and not to be kept")

    def __repr__(self) -> str:
        return f"<SharedRef, {'released' if self._value is None else f'{self._value.num_bytes} bytes'}>"


@dataclass(frozen=True, slots=True)
class _Seen:
    obj: Any  # kept, so that its id stays its own
    value: SharedValue


class Sharing:
    """Gives each object that calls have in common a `SharedValue`; used by one event loop.

    Calls of one tick of the loop that have the same object share its value if the bytes are still the same: code of
    the user's may have run between the calls, and torch does not count all changes of a tensor.

    Args:
        take_value: Packs an object as it is now.
        release: Frees a value that was placed.
    """

    def __init__(self, take_value: TakeValue, release: Callable[[SharedValue], None]) -> None:
        self._take_value = take_value
        self._release = release
        self.is_open = True
        self._seen: dict[int, _Seen] = {}  # in this tick, by the id of the object

    def place(self, obj: Any) -> SharedRef:
        """An object as it is now, for calls to come.

        Raises:
            SerializationError: it cannot be sent.
        """
        return SharedRef(SharedValue(self._take_value(obj), next(_numbers)), self)

    @property
    def has_seen(self) -> bool:
        """Whether an earlier call of this tick has a shared value."""
        return bool(self._seen)

    def recognised(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return a call's arguments, with the values of those that an earlier call of this tick has too."""
        if not any(id(arg) in self._seen for arg in (*args, *kwargs.values())):
            return args, kwargs
        values = {}
        for arg in _untied(args, kwargs):
            seen = self._seen.get(id(arg))
            if seen is not None and _is_unchanged(seen):
                values[id(arg)] = seen.value
        return _replaced(values, args, kwargs)

    def shared(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], num_calls: int = 1
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return a call's arguments with a shared value in place of each large one, for later calls of this tick too.

        Args:
            args: Positional arguments.
            kwargs: Keyword arguments.
            num_calls: Number of calls that have these arguments.
        """
        values = {}
        untied = _untied(args, kwargs)
        for arg in untied:
            if len(untied) > 1 and estimate((arg,), {}) < MIN_SHARED_BYTES:
                continue
            try:
                value = SharedValue(self._take_value(arg), next(_numbers), 0)
            except SerializationError:  # a `SharedRef` is in it; other errors come again as the call is packed
                continue
            if not self._seen:
                asyncio.get_running_loop().call_soon(self._end_tick)
            self._seen[id(arg)] = _Seen(arg, value)
            values[id(arg)] = value
        return _replaced(values, args, kwargs, num_calls)

    def close(self) -> None:
        """Refuse references from now on, and drop the executor that sends calls."""
        self.is_open = False
        self._take_value, self._release = pack, lambda value: None

    def released(self, value: SharedValue) -> None:
        """Note that the reference to a value was dropped or released."""
        value.is_for_tick = True  # calls that still have it, or are made again, do not let a worker keep it
        self._release(value)

    def _end_tick(self) -> None:
        self._seen.clear()


def _is_unchanged(seen: _Seen) -> bool:
    try:
        return seen.value.equals(seen.obj)
    except SerializationError:
        return False


def held(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return a call's arguments with the values of its references, which may be released meanwhile.

    Raises:
        SerializationError: If one was released before.
    """
    for arg in (*args, *kwargs.values()):
        if isinstance(arg, SharedRef):
            break
    else:
        return args, kwargs
    return (
        tuple(arg.value if isinstance(arg, SharedRef) else arg for arg in args),
        {name: arg.value if isinstance(arg, SharedRef) else arg for name, arg in kwargs.items()},
    )


def _untied(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
    """Return the arguments that may have values of their own: those that share no memory with another argument."""
    several = [arg for arg in {id(arg): arg for arg in (*args, *kwargs.values())}.values() if not _goes_along(arg)]
    if len(several) < 2:
        return several
    ties: list[set[int]] = []
    for arg in several:
        if (of_arg := _ties(arg)) is None:
            return []
        ties.append(of_arg)
    num_holders = Counter(tie for of_one in ties for tie in of_one)
    return [arg for arg, of_one in zip(several, ties, strict=True) if all(num_holders[tie] == 1 for tie in of_one)]


def _goes_along(arg: Any) -> bool:
    return isinstance(arg, (*_NUMBERS, SentApart)) or (isinstance(arg, _TEXTS) and len(arg) < MIN_SHARED_BYTES)


def _replaced(
    values: Mapping[int, SharedValue], args: tuple[Any, ...], kwargs: dict[str, Any], num_calls: int = 1
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    for value in values.values():
        if value.num_openings is not None:
            value.num_openings += num_calls
            value.num_unsent += num_calls
    if not values:
        return args, kwargs
    return (
        tuple(values.get(id(arg), arg) for arg in args),
        {name: values.get(id(arg), arg) for name, arg in kwargs.items()},
    )


def _ties(obj: Any) -> set[int] | None:
    """Return the memory and containers of an object, which other arguments may have too; None if that is unknown."""
    ties: set[int] = set()
    num_parts, todo = 0, [obj]
    while todo:
        part = todo.pop()
        kind = type(part)
        num_parts += 1
        if kind in _NUMBERS or kind in _TEXTS:
            continue
        if kind in (Tensor, Parameter):
            if part.layout is not torch.strided or part.__dict__ or part.is_inference():
                return None
            ties.add(part.untyped_storage()._cdata)
        elif kind is np.ndarray and not part.dtype.hasobject:
            ties.add(id(part))
        elif kind in (dict, OrderedDict, list, tuple) and num_parts + len(todo) + len(part) <= _MAX_PARTS:
            if kind is not tuple:
                ties.add(id(part))
            if kind in (dict, OrderedDict):
                todo += part.keys()
                todo += part.values()
            else:
                todo += part
        else:
            return None
    return ties
