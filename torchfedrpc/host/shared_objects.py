"""Objects that all learners of a process share, each made once."""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable
from typing import Any, TypeVar

from torchfedrpc.errors import SnapshotError

T = TypeVar("T")


class SharedObjects:
    """Objects that all learners of a process share, by their keys. Thread-safe."""

    def __init__(self) -> None:
        self._objects: dict[Hashable, Any] = {}
        self._keys: dict[int, Hashable] = {}  # address of an object -> its key
        self._constructors_keys: set[Hashable] = set()
        self._lock = threading.RLock()  # reentrant: a factory may need another shared object

    def get(self, key: Hashable, factory: Callable[[], T], *, in_constructor: bool = False) -> T:
        """Return the object of a key, made by ``factory()`` if needed.

        Args:
            key: The key.
            factory: Makes the object.
            in_constructor: Whether a learner's constructor calls this, so that each process of the learner makes it.
        """
        with self._lock:
            if in_constructor:
                self._constructors_keys.add(key)
            if key not in self._objects:
                self._objects[key] = factory()
                self._keys[id(self._objects[key])] = key
            made: T = self._objects[key]
            return made

    def objects(self) -> dict[str, Any]:
        """Return all objects by their names in messages."""
        with self._lock:
            return {repr(key): value for key, value in self._objects.items()}

    def key_of(self, value: Any) -> tuple[Hashable, bool] | None:
        """Return the key of an object, and whether a constructor asked for it; None if it is not shared."""
        with self._lock:
            if id(value) not in self._keys:
                return None
            key = self._keys[id(value)]
            return key, key in self._constructors_keys

    def find(self, key: Hashable) -> Any:
        """Return the object of a key.

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
