"""Back-pressure: bounds the bytes of arguments that the driver holds for calls in flight."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Collection, Mapping
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from torchfedrpc.wire.packing import SentApart
from torchfedrpc.wire.tensors import take_apart

_SMALL_BYTES = 16  # pickled size of a number, a dict's key, or an object of unknown size
_SCALARS = (int, float, complex, type(None))
_SMALL = (*_SCALARS, SentApart)
_SIZED = (str, bytes, bytearray)
_ARRAYS = (np.ndarray, memoryview)
_CONTAINERS = (list, tuple, set, frozenset, deque)


class Admission:
    """FIFO semaphore counted in bytes, which admits calls while their arguments fit under a limit together.

    Not thread-safe: all methods run on the thread of one event loop.

    Args:
        limit_bytes: Bound for the admitted bytes; a larger single call is admitted alone.
    """

    def __init__(self, limit_bytes: int) -> None:
        self._limit_bytes = limit_bytes
        self._num_bytes = self._num_held_bytes = 0
        self._waiting: deque[tuple[asyncio.Future[None], int]] = deque()
        self._num_waking = 0  # callers that were admitted and have not resumed yet

    @property
    def num_bytes(self) -> int:
        """Bytes admitted and not released."""
        return self._num_bytes

    async def admit(self, num_bytes: int) -> bool:
        """Wait until the bytes fit, and reserve them; `release` returns them.

        If the bytes fit and no caller waits, this returns without a task switch, so that calls submitted in one step
        keep their order. All other callers wait in FIFO order, even those without arguments. A cancelled caller has
        reserved nothing.

        Args:
            num_bytes: Size of the call's arguments.

        Returns:
            Whether the caller had to wait.
        """
        if not self._waiting and not self._num_waking and self._has_room(num_bytes):
            self._num_bytes += num_bytes
            return False
        await self.wait(self.request(num_bytes), num_bytes)
        return True

    def request(self, num_bytes: int) -> asyncio.Future[None]:
        """Enter the queue, and return a future for `wait`, or for `withdraw`."""
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append((turn, num_bytes))
        if not self._num_waking:  # else the caller that wakes admits the next
            self._wake()
        return turn

    async def wait(self, turn: asyncio.Future[None], num_bytes: int) -> None:
        """Wait until a request is admitted. A cancelled caller has reserved nothing."""
        try:
            await turn
        except asyncio.CancelledError:
            self.withdraw(turn, num_bytes)
            raise
        self._num_waking -= 1
        self._wake()  # callers that arrived while this one was waking

    def withdraw(self, turn: asyncio.Future[None], num_bytes: int) -> None:
        """Leave the queue, or return the bytes of a request that was admitted."""
        if turn.done() and not turn.cancelled():
            self._num_waking -= 1
            self._num_bytes -= num_bytes
        else:
            turn.cancel()
        self._wake()

    def admit_now(self, num_bytes: int) -> bool:
        """Reserve bytes if they fit and no call waits, and return whether they were reserved."""
        if self._waiting or self._num_waking or not self._has_room(num_bytes):
            return False
        self._num_bytes += num_bytes
        return True

    def take(self, num_bytes: int) -> int:
        """Grow an admitted reservation without waiting, and return the bytes added."""
        self._num_bytes += max(num_bytes, 0)
        return max(num_bytes, 0)

    def release(self, num_bytes: int) -> None:
        """Return reserved bytes, and admit waiting callers."""
        self._num_bytes -= num_bytes
        if self._waiting:
            self._wake()

    def hold(self, num_bytes: int) -> None:
        """Set the bytes that the driver holds beside calls; a single call is admitted even above the limit."""
        self._num_held_bytes = num_bytes
        self._wake()

    def _has_room(self, num_bytes: int) -> bool:
        in_hands = self._num_bytes + self._num_held_bytes
        return not num_bytes or not self._num_bytes or in_hands + num_bytes <= self._limit_bytes

    def _wake(self) -> None:
        while self._waiting:
            turn, num_bytes = self._waiting[0]
            if not turn.cancelled():
                if not self._has_room(num_bytes):
                    return
                self._num_bytes += num_bytes
                self._num_waking += 1
                turn.set_result(None)
            self._waiting.popleft()


def estimate(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> int:
    """Estimate the bytes of a call's arguments without copying.

    The estimate follows pickling: it looks into containers, and into objects that are pickled by their ``__dict__``
    (a module's weights). An object referred to twice counts once, as does memory shared by tensors.

    Returns:
        Bytes; 0 without arguments.
    """
    if not args and not kwargs:
        return 0
    with torch._C.DisableTorchFunctionSubclass():  # reading the size must not run code of tensor subclasses
        return _estimate([*args, *kwargs.values()])


def _estimate(todo: list[Any]) -> int:
    seen: set[int] = set()
    num_bytes_of: dict[int, int] = {}  # storage -> bytes of the tensors on it
    total = 0
    while todo:
        obj = todo.pop()
        if isinstance(obj, _SMALL):
            total += _SMALL_BYTES
            continue
        if id(obj) in seen:
            continue
        seen.add(id(obj))
        if isinstance(obj, Tensor):
            if obj.layout is torch.strided:
                total += _of_tensor(obj, num_bytes_of)
            else:
                parts = take_apart(obj) or ()  # temporary objects, so their ids are not recorded in `seen`
                total += sum(_of_tensor(part, num_bytes_of) for part in parts if isinstance(part, Tensor))
        elif isinstance(obj, _SIZED):
            total += len(obj)
        elif isinstance(obj, _ARRAYS):
            total += obj.nbytes
        elif isinstance(obj, dict):
            total += _SMALL_BYTES * len(obj)
            total += _of_items(obj.values(), todo)
        elif isinstance(obj, _CONTAINERS):
            total += _of_items(obj, todo)
        else:
            total += _SMALL_BYTES
            if isinstance(obj, nn.Module) or _is_pickled_by_dict(obj):
                todo.append(vars(obj))
    return total


def _of_items(items: Collection[Any], todo: list[Any]) -> int:
    """Return the bytes of a container's items if all are numbers, without a loop over possibly millions; else 0."""
    if all(issubclass(kind, _SCALARS) for kind in set(map(type, items))):
        return _SMALL_BYTES * len(items)
    todo += items
    return 0


def _of_tensor(tensor: Tensor, num_bytes_of: dict[int, int]) -> int:
    """Return the bytes that a dense tensor adds to the tensors counted on its storage."""
    try:
        storage, num_bytes = tensor.untyped_storage(), tensor.nbytes
    except Exception:
        return _SMALL_BYTES  # a tensor without memory; packing refuses it with an explanation
    before = num_bytes_of.get(storage._cdata, 0)
    after = max(before, min(before + num_bytes, storage.nbytes())) if before else num_bytes
    num_bytes_of[storage._cdata] = after
    return after - before


def _is_pickled_by_dict(obj: object) -> bool:
    kind = type(obj)
    return (
        hasattr(obj, "__dict__")
        and not isinstance(obj, type | ModuleType)
        and kind.__reduce_ex__ is object.__reduce_ex__
        and kind.__reduce__ is object.__reduce__
        and kind.__getstate__ is object.__getstate__
    )
