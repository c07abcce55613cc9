"""What a running method can ask of its host: `current_call`."""

from __future__ import annotations

import contextvars
import threading
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch

from torchfedrpc.errors import SnapshotError

T = TypeVar("T")


class SharedObjects:
    """Objects that all learners of a process have in common, each made once.

    Args:
        make: calls the factory of a key in a scope apart from the running call, since placement decides which call
            is the first to need the object.
    """

    def __init__(self, make: Callable[[Hashable, Callable[[], Any]], Any]) -> None:
        self._make = make
        self._objects: dict[Hashable, Any] = {}
        self._keys: dict[int, Hashable] = {}  # address of an object -> its key
        self._constructors_keys: set[Hashable] = set()
        self._lock = threading.RLock()  # a factory may ask for another shared object

    def get(self, key: Hashable, factory: Callable[[], T], *, in_constructor: bool = False) -> T:
        """The object of that key, made by ``factory()`` where there is none yet.

        Args:
            key: the key.
            factory: makes it.
            in_constructor: whether a learner's constructor calls this, so that each of its processes makes it.
        """
        with self._lock:
            if in_constructor:
                self._constructors_keys.add(key)
            if key not in self._objects:
                self._objects[key] = self._make(key, factory)
                self._keys[id(self._objects[key])] = key
            made: T = self._objects[key]
            return made

    def objects(self) -> dict[str, Any]:
        """All of them, by what to call them in a message."""
        with self._lock:
            return {repr(key): value for key, value in self._objects.items()}

    def key_of(self, value: Any) -> tuple[Hashable, bool] | None:
        """The key of an object, and whether a learner's constructor asked for it; None if it is not shared."""
        with self._lock:
            if id(value) not in self._keys:
                return None
            key = self._keys[id(value)]
            return key, key in self._constructors_keys

    def find(self, key: Hashable) -> Any:
        """The object of a key.

        Raises:
            SnapshotError: If this process has not made it.
        """
        with self._lock:
            if key in self._objects:
                return self._objects[key]
        raise SnapshotError(
            f"the learner's state refers to the shared object {key!r}, which its constructor has not made here: call "
            f"current_call().shared({key!r}, ...) in the constructor, or name the attribute in not_state"
        )


@dataclass(eq=False)
class CallContext:
    """The call that is running, as `current_call` gives it.

    Attributes:
        client_id: the client of the learner.
        method: the method's name; ``__init__`` while the learner is made.
        call_id: unique in a run.
        device: where this process's learners should put their tensors.
        trusted_modules: the packages that the run trusts, the learner's own among them.
    """

    client_id: str
    method: str
    call_id: int
    device: torch.device
    trusted_modules: frozenset[str]
    _seed: int = field(repr=False)
    _shared: SharedObjects = field(repr=False)
    _is_cancelled: Callable[[], bool] = field(repr=False)
    _report: Callable[[Any], None] = field(repr=False)
    _generator: torch.Generator | None = field(default=None, repr=False)

    @property
    def cancelled(self) -> bool:
        """Whether the result is no longer wanted: a deadline passed, or the caller was cancelled.

        A long sync method should check it now and then, and return.
        """
        return self._is_cancelled()

    @property
    def generator(self) -> torch.Generator:
        """A generator on `device`, seeded for this call alone; made at first use."""
        if self._generator is None:
            self._generator = torch.Generator(self.device).manual_seed(self._seed)
        return self._generator

    def report(self, progress: Any) -> None:
        """Send progress of this call to the driver's subscribers, who get it before the call's result.

        Raises:
            SerializationError: If ``progress`` cannot be sent.
        """
        self._report(progress)

    def shared(self, key: Hashable, factory: Callable[[], T]) -> T:
        """One object per process, such as a dataset: made by ``factory()`` at the first call with that key.

        Its random draws depend on (run seed, ``repr(key)``) alone, so use strings, numbers or tuples of them.
        """
        return self._shared.get(key, factory, in_constructor=self.method == "__init__")


running_call: contextvars.ContextVar[CallContext] = contextvars.ContextVar("torchfedrpc_current_call")
"""The call in which code runs; `CallScope` sets it."""


def current_call() -> CallContext:
    """The call in which this code runs.

    Raises:
        RuntimeError: If this code does not run in a learner's constructor or method (or runs in a thread that one
            started without its context).
    """
    try:
        return running_call.get()
    except LookupError:
        raise RuntimeError(
            "current_call() is for code that a proxy's call runs: a learner's constructor or method"
        ) from None
