"""Arguments shared by calls: placed by `LearnerProxy.share`, or recognised in calls of one event-loop tick."""

from __future__ import annotations

import asyncio
import itertools
import weakref
from collections import Counter, OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn.parameter import Parameter

from torchfedrpc.errors import SerializationError
from torchfedrpc.executors.admission import estimate
from torchfedrpc.tasks import call_on
from torchfedrpc.wire.allowlist import AllowList
from torchfedrpc.wire.packing import Packed, SentApart
from torchfedrpc.wire.shared import SharedValue

MIN_SHARED_BYTES = 16 << 10  # smaller arguments are sent with each call
_MAX_PARTS = 10_000  # of an object that is examined; with more parts, comparing the bytes is no slower
_NUMBERS = (type(None), bool, int, float, complex)
_TEXTS = (str, bytes)

_numbers = itertools.count(1)  # of values; unique in this process


class SharingLearners(Protocol):
    """Learners whose calls share values."""

    def take_shared(self, obj: Any) -> Packed:
        """Pack the present value of an object, for several calls."""

    def unshare(self, value: SharedValue) -> None:
        """Free a shared value in all caches."""


class SharedRef(SentApart):
    """Reference to an object that each worker receives once. As an argument of a call it arrives as the object.

    Each call gets a separate object; memory is copied on write. The value is freed when this reference is dropped or
    released (`release`), after the calls that use it have ended.
    """

    def __init__(self, value: SharedValue, sharing: Sharing) -> None:
        self._value: SharedValue | None = value
        self._sharing = sharing
        loop = asyncio.get_running_loop()
        self._release = weakref.finalize(self, call_on, loop, sharing.released, value)
        self._release.atexit = False

    @property
    def value(self) -> SharedValue:
        """The shared value.

        Raises:
            SerializationError: If the reference was released, or its proxy is closed.
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

    def open(self, allow: AllowList, device: torch.device | None = None) -> Any:
        """Return the object, as a copy for the caller."""
        return self.value.open(allow, device)

    async def release(self) -> None:
        """Free the object on all workers. Calls submitted before still receive it."""
        self._value = None
        self._release()

    def __reduce__(self) -> Any:
        raise SerializationError("a SharedRef is for the arguments of calls of its own proxy, and not to be kept")

    def __repr__(self) -> str:
        return f"<SharedRef, {'released' if self._value is None else f'{self._value.num_bytes} bytes'}>"


@dataclass(frozen=True, slots=True)
class _Seen:
    obj: Any  # a reference, so that its id stays unique
    value: SharedValue


class Sharing:
    """Table of the shared values of calls. Not thread-safe: one event loop uses it.

    Calls of one tick of the loop with the same object share its value if the bytes are unchanged. The bytes are
    compared, since user code may run between the calls and torch does not count all changes of a tensor.

    Args:
        learners: Pack the present value of an object, and free a value that was placed.
    """

    def __init__(self, learners: SharingLearners) -> None:
        self._learners: SharingLearners | None = learners  # None once the proxy is closed
        self._seen: dict[int, _Seen] = {}  # id of an object -> its value, in this tick

    def place(self, obj: Any) -> SharedRef:
        """Return a reference to the present value of an object, for later calls.

        Raises:
            SerializationError: If the object cannot be sent, or the proxy is closed.
        """
        if self._learners is None:
            raise SerializationError("an object is shared by a proxy that is open")
        return SharedRef(SharedValue(self._learners.take_shared(obj), next(_numbers)), self)

    @property
    def is_open(self) -> bool:
        """Whether the proxy is open."""
        return self._learners is not None

    @property
    def has_seen(self) -> bool:
        """Whether an earlier call of this tick has a shared value."""
        return bool(self._seen)

    def recognised(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return a call's arguments, with those that an earlier call of this tick has replaced by its values."""
        if not any(id(arg) in self._seen for arg in (*args, *kwargs.values())):
            return args, kwargs
        values = {}
        for arg in _untied(args, kwargs):
            seen = self._seen.get(id(arg))
            if seen is None or not seen.value.join():  # before the comparison: a call may open it meanwhile
                continue
            if _is_unchanged(seen):
                values[id(arg)] = seen.value
            else:
                seen.value.leave()
        return _replaced(values, args, kwargs)

    def shared(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], num_calls: int = 1
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return a call's arguments with large ones replaced by shared values, which later calls of this tick reuse.

        Args:
            args: Positional arguments.
            kwargs: Keyword arguments.
            num_calls: Number of calls with these arguments.
        """
        if self._learners is None:  # the call has waited for admission until the proxy was closed
            return args, kwargs
        values = {}
        untied = _untied(args, kwargs)
        for arg in untied:
            if len(untied) > 1 and estimate((arg,), {}) < MIN_SHARED_BYTES:
                continue
            try:
                value = SharedValue(self._learners.take_shared(arg), next(_numbers), num_calls)
            except SerializationError:  # it contains a `SharedRef`; other errors are raised again by packing the call
                continue
            if not self._seen:
                asyncio.get_running_loop().call_soon(self._end_tick)
            self._seen[id(arg)] = _Seen(arg, value)
            values[id(arg)] = value
        return _replaced(values, args, kwargs)

    def close(self) -> None:
        """Refuse references from now on, and drop the learners, which references outlive."""
        self._learners = None

    def released(self, value: SharedValue) -> None:
        """Free the value of a reference that was dropped or released."""
        value.is_for_tick = True  # workers do not cache it for pending or replayed calls
        if self._learners is not None:
            self._learners.unshare(value)

    def _end_tick(self) -> None:
        self._seen.clear()


def _is_unchanged(seen: _Seen) -> bool:
    try:
        return seen.value.equals(seen.obj)
    except SerializationError:
        return False


def held(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return a call's arguments with references replaced by their values, which a later release does not affect.

    Raises:
        SerializationError: If a reference was released already.
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
    """Return the arguments that can be shared separately: they share no memory with another argument."""
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
    values: Mapping[int, SharedValue], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if not values:
        return args, kwargs
    return (
        tuple(values.get(id(arg), arg) for arg in args),
        {name: values.get(id(arg), arg) for name, arg in kwargs.items()},
    )


def _ties(obj: Any) -> set[int] | None:
    """Return ids of an object's memory and containers, to detect overlap with other arguments; None if unknown."""
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
