"""What calls have in common: placed on purpose by `LearnerProxy.share`, or recognised in the calls of one tick."""

from __future__ import annotations

import asyncio
import itertools
import weakref
from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import CodeType
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

_MIN_BYTES = 16 << 10  # a smaller argument goes along with its call
_MAX_PARTS = 10_000  # of an object that is looked into; where it has more, comparing the bytes takes no longer
_NUMBERS = (type(None), bool, int, float, complex)
_TEXTS = (str, bytes)
TakeValue = Callable[[Any], Packed]
_Part = tuple[Any, int, int, bool]  # a tensor, its version, its address, whether it requires a gradient

_numbers = itertools.count(1)  # of values, in this process
_nothing_before: set[CodeType] = set()


def submits_first(function: Callable[..., Any]) -> Callable[..., Any]:
    """Mark a coroutine function that submits a call before it awaits anything.

    A task that is nothing but such a coroutine has run no code of the user's, which could have changed an argument.
    """
    _nothing_before.add(function.__code__)
    return function


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
class _Parts:
    """What an object consists of: plain containers, numbers, strings, arrays and dense tensors, in order.

    Attributes:
        each: all of them.
        has_versions: whether torch counts what is written into any of them; it does not for an array.
    """

    each: list[_Part]
    has_versions: bool

    def are_those_of(self, other: _Parts) -> bool:
        """Whether they are the same objects, of the same versions."""
        return len(self.each) == len(other.each) and all(
            ours[0] is theirs[0] and ours[1:] == theirs[1:]
            for ours, theirs in zip(self.each, other.each, strict=True)
        )

    def ties(self) -> set[int]:
        """What another object may have too, so that both must travel together to have it in common there."""
        return {
            part.untyped_storage()._cdata if isinstance(part, Tensor) else id(part)
            for part, *_ in self.each
            if isinstance(part, (Tensor, np.ndarray, dict, list))
        }


@dataclass(frozen=True, slots=True)
class _Seen:
    obj: Any  # kept, so that its id stays its own
    value: SharedValue
    parts: _Parts | None


class Sharing:
    """Gives each object that calls have in common a `SharedValue`; of one event loop.

    The calls of one tick of the loop share what is equal: what torch's version counters say has not changed, where
    no code of the user's has run between the calls; else what has the same bytes.

    Args:
        take_value: takes an object as it is now.
        release: frees a value that was placed.
    """

    def __init__(self, take_value: TakeValue, release: Callable[[SharedValue], None]) -> None:
        self._take_value = take_value
        self._release = release
        self.is_open = True
        self._seen: dict[int, _Seen] = {}  # in this tick, by the id of the object
        self._next: Any = None  # the task that runs right after the last call was looked at

    def place(self, obj: Any) -> SharedRef:
        """An object as it is now, for calls to come.

        Raises:
            SerializationError: it cannot be sent.
        """
        return SharedRef(SharedValue(self._take_value(obj), next(_numbers)), self)

    def recognised(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Arguments of a call, with what an earlier call of this tick has too in place of its own."""
        if not self._seen or not any(id(arg) in self._seen for arg in (*args, *kwargs.values())):
            return args, kwargs
        values = {}
        for arg, parts in _untied(args, kwargs):
            seen = self._seen.get(id(arg))
            if seen is not None and self._is_unchanged(seen, parts):
                values[id(arg)] = seen.value
        self._next = _next_task()
        return _replaced(values, args, kwargs)

    def shared(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], num_bytes: int, num_calls: int = 1
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Arguments of a call, with what the next calls of this tick may have too in values of their own.

        Args:
            args: positional ones.
            kwargs: by name.
            num_bytes: of all of them, about.
            num_calls: calls that have these very arguments.
        """
        if num_bytes < _MIN_BYTES:
            return args, kwargs
        values = {}
        self._next = _next_task()
        untied = _untied(args, kwargs, needs_parts=self._next is not None)
        for arg, parts in untied:
            if len(untied) > 1 and estimate((arg,), {}) < _MIN_BYTES:
                continue
            try:
                value = SharedValue(self._take_value(arg), next(_numbers), 0)
            except SerializationError:  # a `SharedRef` is in it; else the call, which is packed next, says what is
                continue
            if not self._seen:
                asyncio.get_running_loop().call_soon(self._end_tick)
            self._seen[id(arg)] = _Seen(arg, value, parts)
            values[id(arg)] = value
        return _replaced(values, args, kwargs, num_calls)

    def close(self) -> None:
        """Let no call have any more what was placed, and let go of whoever has calls."""
        self.is_open = False
        self._take_value, self._release = pack, lambda value: None

    def released(self, value: SharedValue) -> None:
        """Nobody refers to a value any more that was placed."""
        value.is_for_tick = True  # who has it still, or again after a loss, is no reason for a worker to keep it
        self._release(value)

    def _end_tick(self) -> None:
        self._seen.clear()
        self._next = None

    def _is_unchanged(self, seen: _Seen, parts: _Parts | None) -> bool:
        if seen.parts is not None and seen.parts.has_versions and self._has_followed():
            return parts is not None and parts.are_those_of(seen.parts)
        try:
            return seen.value.equals(seen.obj)
        except SerializationError:
            return False

    def _has_followed(self) -> bool:
        """Whether no code of the user's has run since the last call was looked at."""
        return self._next is not None and self._next is asyncio.current_task() and _is_submission(self._next)


def held(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments of a call, which hold what they refer to, so that whoever placed it may release it meanwhile.

    Raises:
        SerializationError: it was released before.
    """
    if not (args or kwargs) or not any(isinstance(arg, SharedRef) for arg in (*args, *kwargs.values())):
        return args, kwargs
    return (
        tuple(arg.value if isinstance(arg, SharedRef) else arg for arg in args),
        {name: arg.value if isinstance(arg, SharedRef) else arg for name, arg in kwargs.items()},
    )


def _untied(
    args: tuple[Any, ...], kwargs: dict[str, Any], *, needs_parts: bool = True
) -> list[tuple[Any, _Parts | None]]:
    """The arguments that may have a value apart, with their parts: those that have no ties to any other."""
    several = {id(arg): arg for arg in (*args, *kwargs.values()) if not _goes_along(arg)}
    if len(several) < 2 and not needs_parts:
        return [(arg, None) for arg in several.values()]
    each = [(arg, _parts(arg)) for arg in several.values()]
    if len(each) < 2:
        return each
    if any(parts is None for _, parts in each):
        return []
    ties = [parts.ties() for _, parts in each if parts is not None]
    num_holders = Counter(tie for of_one in ties for tie in of_one)
    return [one for one, of_one in zip(each, ties, strict=True) if all(num_holders[tie] == 1 for tie in of_one)]


def _goes_along(arg: Any) -> bool:
    return isinstance(arg, (*_NUMBERS, SentApart)) or (isinstance(arg, _TEXTS) and len(arg) < _MIN_BYTES)


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


def _next_task() -> Any:
    """The task whose step comes right after the present one, where that is of a submission alone; else None.

    Calls that are gathered follow each other so. What else runs between two calls may change what they have in common
    unseen by torch's counters, and only the loop's own queue tells; with a loop that hides it, bytes are compared.
    """
    if not _is_submission(asyncio.current_task()):
        return None
    ready = getattr(asyncio.get_running_loop(), "_ready", None)
    return getattr(getattr(ready[0], "_callback", None), "__self__", None) if ready else None


def _is_submission(task: Any) -> bool:
    """Whether a task runs nothing but what was marked by `submits_first`."""
    coroutine = task.get_coro() if task is not None else None
    return getattr(coroutine, "cr_code", None) in _nothing_before


def _parts(obj: Any) -> _Parts | None:
    """What an object consists of; None where that is too much, or other things are in it."""
    each: list[_Part] = []
    has_versions = True
    todo = [obj]
    while todo:
        part = todo.pop()
        kind = type(part)
        if kind in _NUMBERS or kind in _TEXTS:
            each.append((part, 0, 0, False))
        elif kind in (Tensor, Parameter):
            if part.layout is not torch.strided or part.__dict__ or part.is_inference():
                return None
            try:
                each.append((part, part._version, part.data_ptr(), part.requires_grad))
            except RuntimeError:  # it has no memory
                return None
        elif kind is np.ndarray and not part.dtype.hasobject:
            each.append((part, 0, 0, False))
            has_versions = False
        elif kind in (dict, OrderedDict, list, tuple) and len(each) + len(todo) + len(part) <= _MAX_PARTS:
            each.append((part, len(part), 0, False))
            if kind in (dict, OrderedDict):
                todo += part.keys()
                todo += part.values()
            else:
                todo += part
        else:
            return None
    return _Parts(each, has_versions)
