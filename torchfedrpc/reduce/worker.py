"""The reductions that a host takes part in: what its learners' results come to, until the driver collects it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torchfedrpc.host.call import Part
from torchfedrpc.reduce.reducers import Reducer, is_builtin
from torchfedrpc.reduce.tree import Forest, MergeError, Node
from torchfedrpc.wire.allowlist import AllowList
from torchfedrpc.wire.exceptions import Failure
from torchfedrpc.wire.packing import Packed


@dataclass
class _Begun:
    """A reduction; its reducer is opened when the first result comes, since that may be code of the user's."""

    prototype: Packed
    num_places: int
    lock: threading.Lock = field(default_factory=threading.Lock)
    opened: tuple[Reducer, Forest] | None = None


class Reductions:
    """Forests by the number of their reduction. Thread-safe.

    Args:
        take_value: takes an object as it is now.
        allow: the types that may travel.
    """

    def __init__(self, take_value: Callable[[Any], Packed], allow: AllowList) -> None:
        self._take_value = take_value
        self._allow = allow
        self._begun: dict[int, _Begun] = {}
        self._lock = threading.Lock()

    def __len__(self) -> int:
        """How many reductions this host takes part in."""
        return len(self._begun)

    def begin(self, number: int, prototype: Packed, num_places: int, going_on: Iterable[int] | None) -> None:
        """Take part in a reduction, unless this host does already.

        Args:
            number: the reduction's.
            prototype: the reducer, as nobody has added to it.
            num_places: how many clients of the run take part.
            going_on: numbers of the reductions that are not over, where some may be of which nobody could tell.
        """
        with self._lock:
            for other in () if going_on is None else self._begun.keys() - set(going_on):
                del self._begun[other]
            self._begun.setdefault(number, _Begun(prototype, num_places))

    def end(self, number: int) -> None:
        """A reduction is over."""
        with self._lock:
            self._begun.pop(number, None)

    def add(self, part: Part, result: Any) -> None:
        """Take a client's result, on its method's thread: a reducer of the user's has a value of its own.

        Args:
            part: what the result is.
            result: of the client's call.

        Raises:
            MergeError: it does not go together with another client's.
            SerializationError: the reducer cannot be opened here.
            Exception: what the reducer raised.
        """
        reducer, forest = self._opened(part.reduction)
        if not is_builtin(reducer):
            result = self._take_value(result).open(self._allow)
        with self._merging():
            forest.add(part.place, result)

    def are_quick(self, number: int) -> bool:
        """Whether no code of the user's is run as the partial results of this reduction are collected and packed."""
        with self._lock:
            begun = self._begun.get(number)
        return begun is not None and begun.opened is not None and is_builtin(begun.opened[0])

    def collect(self, number: int, skipped: Iterable[int]) -> tuple[list[Node], bool]:
        """The partial results that are here, each as large as it can be; then this host has none.

        Args:
            number: the reduction's.
            skipped: places of this host's clients that count for nothing, now or when their results come late.

        Returns:
            The partial results, and whether it is certain that nobody else holds their memory.

        Raises:
            MergeError: two of them do not go together.
        """
        reducer, forest = self._opened(number)
        with self._merging():
            for place in set(skipped).intersection(forest.waiting()):
                forest.skip(place)
            return forest.take(), is_builtin(reducer)

    def _opened(self, number: int) -> tuple[Reducer, Forest]:
        with self._lock:
            begun = self._begun.get(number)
        if begun is None:
            raise RuntimeError("its reduction is over: the driver does not wait for this result any more")
        with begun.lock:
            if begun.opened is None:
                reducer = begun.prototype.copy().open(self._allow)
                begun.opened = reducer, Forest(reducer, range(begun.num_places))
            return begun.opened

    @contextmanager
    def _merging(self) -> Iterator[None]:
        """Where two results do not go together, the driver hears of it, whatever a reducer has raised."""
        try:
            yield
        except MergeError as error:
            reason = Failure.capture(error.reason).restore(self._allow, "as results were added up")
            raise MergeError(error.places, reason) from error.reason
