"""Fixed binary tree in which the results of a group are merged, independent of their placement on workers.

Clients have places, 0 to n - 1. Node ``(level, index)`` covers the places from ``index * 2**level`` to
``(index + 1) * 2**level - 1``, and its value depends only on the values of its two children. So the bits of the root
depend neither on the process that computes a node nor on the order of computation. A client that takes no part, or
fails, leaves its node empty. If one child is empty, the node takes the value of the other child.
"""

from __future__ import annotations

import copy
import threading
from bisect import bisect_left
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

from torchfedrpc.reduce.reducers import Reducer

Node = tuple[int, int, Reducer, tuple[int, ...]]
"""Level, index, the reducer with the results of this node's clients, and the places of those clients."""

T = TypeVar("T")

_WAITING, _COUNTED, _SKIPPED = range(3)
_PUT_DOWN = object()


class MergeError(Exception):
    """Two partial results that cannot be merged; the reason is the ``__cause__``.

    The results within each part were merged, so a statement about one client of each part holds for both parts.

    Attributes:
        places: The first client's place on the left and on the right side.
        reason: The error of ``merge``.
    """

    def __init__(self, places: tuple[int, int], reason: BaseException) -> None:
        super().__init__(places, reason)
        self.places = places
        self.reason = reason

    def __str__(self) -> str:
        return (
            f"the results of the clients at {self.places[0]} and {self.places[1]} do not go together: {self.reason}"
        )


class Forest:
    """Nodes of one tree in this process: on a worker those of its clients, on the driver finally all.

    A node is computed when its two children are complete: each of their clients was added or skipped. So a forest
    of neighbouring clients that complete in order holds at most about log2 of their number of reducers.

    Thread-safe. The lock guards only the table of nodes. A reducer belongs to one thread while it is modified, so
    reducers are filled and merged outside the lock, those of different nodes in parallel.

    Args:
        prototype: An empty reducer; each client's reducer is a deep copy.
        places: Places of all participating clients of the run, ascending. The numbers are arbitrary, but must be the
            same in all forests of a run.

    Raises:
        ValueError: If the places are not ascending, or below 0.
    """

    def __init__(self, prototype: Reducer, places: Iterable[int]) -> None:
        self._prototype = prototype
        self._places = tuple(places)
        if any(left >= right for left, right in zip((-1, *self._places), self._places, strict=False)):
            raise ValueError("places must be ascending numbers from 0 on")
        self._height = self._places[-1].bit_length() if self._places else 0
        self._states = bytearray(len(self._places))  # by rank among the places
        self._nodes: dict[tuple[int, int], Reducer | None] = {}  # complete nodes; None has no counted client
        self._num_climbing = 0  # number of threads that are merging a node
        self._error: MergeError | None = None
        self._changed = threading.Condition()  # its lock guards the four attributes above

    def __len__(self) -> int:
        """Return the number of reducers that the forest holds."""
        with self._changed:
            return sum(reducer is not None for reducer in self._nodes.values())

    def waiting(self) -> list[int]:
        """Return the places that were neither added, skipped nor put here."""
        with self._changed:
            return self._with_state(0, len(self._places), _WAITING)

    def add(self, place: int, result: Any) -> None:
        """Add a client's result, and merge the nodes that it completes.

        Args:
            place: The client's place.
            result: The result of its call.

        Raises:
            MergeError: If two parts cannot be merged. The forest is unusable then, and every later step raises it.
            ValueError: If the place takes no part, or was added or skipped before.
            Exception: If the reducer's ``add`` raised it; the place stays in the state of waiting.
        """
        rank = self._rank(place)
        with self._changed:
            self._check_usable()
            self._check_waiting(rank)
        leaf = copy.deepcopy(self._prototype)
        leaf.add(result)
        with self._changed:
            self._check_usable()
            self._check_waiting(rank)
            self._states[rank] = _COUNTED
            self._num_climbing += 1
        self._climb(0, place, leaf)

    def skip(self, place: int) -> None:
        """Skip a client, if it was not skipped before, and merge the nodes that this completes.

        Raises:
            MergeError: As in `add`.
            ValueError: If the place takes no part, or was added before.
        """
        rank = self._rank(place)
        with self._changed:
            self._check_usable()
            if self._states[rank] == _SKIPPED:
                return
            self._check_waiting(rank)
            self._states[rank] = _SKIPPED
            self._num_climbing += 1
        self._climb(0, place, None)

    def take(self) -> list[Node]:
        """Return the largest complete nodes with a counted client, from left to right, and empty the forest.

        The forest then waits again for all places except the skipped ones. This waits for threads that are merging.
        The result of a concurrent `add` is in these nodes or in the next ones.

        Raises:
            MergeError: As in `add`.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._num_climbing == 0)
            self._check_usable()
            nodes = [
                (level, index, reducer, tuple(self._with_state(*self._ranks(level, index), _COUNTED)))
                for (level, index), reducer in self._nodes.items()
                if reducer is not None
            ]
            skipped = self._with_state(0, len(self._places), _SKIPPED)
            self._nodes.clear()
            self._states = bytearray(len(self._places))
            for place in skipped:  # a late result must not enter the next nodes
                self.skip(place)
        return sorted(nodes, key=lambda node: node[3])

    def put(self, level: int, index: int, reducer: Reducer, places: Sequence[int]) -> None:
        """Put a node from another forest of the same places, and merge the nodes that it completes.

        Clients of the node that are not among ``places`` are skipped.

        Raises:
            MergeError: As in `add`.
            ValueError: If it is not a node of this tree, counts a client that was skipped or counted here, or counts
                none.
        """
        if not 0 <= level <= self._height:
            raise ValueError(f"the tree has levels 0 to {self._height}, and none {level}")
        first, end = self._ranks(level, index)
        ranks = {self._rank(place) for place in places}
        if not ranks or not all(first <= rank < end for rank in ranks):
            raise ValueError(f"node ({level}, {index}) must count clients that it covers, not those at {[*places]}")
        with self._changed:
            self._check_usable()
            for rank in range(first, end):
                if rank in ranks or self._states[rank] == _COUNTED:
                    self._check_waiting(rank)
            self._states[first:end] = bytes([_SKIPPED]) * (end - first)
            for rank in ranks:
                self._states[rank] = _COUNTED
            self._num_climbing += 1
        self._climb(level, index, reducer)

    def finish(self) -> tuple[Any, int]:
        """Return the value of the whole tree and the number of counted clients, and empty the forest.

        Raises:
            MergeError: As in `add`.
            ValueError: If a place is still waiting, or no client is counted.
            Exception: If the reducer's ``finish`` raised it.
        """
        if waiting := self.waiting():
            raise ValueError(f"{len(waiting)} clients are neither added nor skipped, such as that at {waiting[0]}")
        nodes = self.take()
        if not nodes:
            raise ValueError("there is nothing to reduce: no client counts")
        [(_, _, reducer, places)] = nodes
        return reducer.finish(), len(places)

    def _climb(self, level: int, index: int, reducer: Reducer | None) -> None:
        """Merge a complete node with its sibling, and so on up the tree, then store the last node."""
        try:
            while (sibling := self._put_down_or_pick_up(level, index, reducer)) is not _PUT_DOWN:
                left, right = (sibling, reducer) if index & 1 else (reducer, sibling)
                level, index = level + 1, index >> 1
                reducer = self._merged(level, index, left, right)
        finally:
            with self._changed:
                self._num_climbing -= 1
                self._changed.notify_all()

    def _put_down_or_pick_up(self, level: int, index: int, reducer: Reducer | None) -> Any:
        """Return the sibling's reducer if the sibling is complete; else store this node and return `_PUT_DOWN`."""
        sibling = level, index ^ 1
        with self._changed:
            if level < self._height:
                if sibling in self._nodes:
                    return self._nodes.pop(sibling)
                first, end = self._ranks(*sibling)
                if first == end:
                    return None
            self._nodes[level, index] = reducer
            return _PUT_DOWN

    def _merged(self, level: int, index: int, left: Reducer | None, right: Reducer | None) -> Reducer | None:
        """Return the value of a node from its children."""
        if left is None or right is None:
            return right if left is None else left
        try:
            left.merge(right)
        except BaseException as reason:
            with self._changed:
                first, end = self._ranks(level, index)
                _, middle = self._ranks(level - 1, 2 * index)
                places = [self._with_state(*side, _COUNTED)[0] for side in ((first, middle), (middle, end))]
                self._error = MergeError((places[0], places[1]), reason)
                self._nodes.clear()
                if isinstance(reason, Exception):
                    raise self._error from reason
            raise
        return left

    # Callers of the following methods hold the lock.

    def _check_usable(self) -> None:
        if self._error is not None:
            raise MergeError(self._error.places, self._error.reason) from self._error.reason

    def _check_waiting(self, rank: int) -> None:
        if self._states[rank] != _WAITING:
            state = "counted" if self._states[rank] == _COUNTED else "skipped"
            raise ValueError(f"the client at {self._places[rank]} is {state} already")

    def _with_state(self, first: int, end: int, state: int) -> list[int]:
        return [self._places[rank] for rank in range(first, end) if self._states[rank] == state]

    def _rank(self, place: int) -> int:
        rank = bisect_left(self._places, place)
        if rank == len(self._places) or self._places[rank] != place:
            raise ValueError(f"the client at {place} takes no part")
        return rank

    def _ranks(self, level: int, index: int) -> tuple[int, int]:
        """Return the range of ranks that a node covers: the first, and the one after the last."""
        first = bisect_left(self._places, index << level)
        return first, bisect_left(self._places, (index + 1) << level, lo=first)


def fold(parts: Iterable[T | None], merge: Callable[[T, T], T]) -> T | None:
    """Return the value of the same tree over an iterable; each part is requested when it is due.

    At most about log2 of the number of parts are held at a time.

    Args:
        parts: Values of place 0, 1 and so on; None is skipped.
        merge: Returns a node's value from its left and right child; it may consume both.

    Returns:
        The root's value; None if all parts are None.
    """

    def merged(left: T | None, right: T | None) -> T | None:
        if left is None or right is None:
            return right if left is None else left
        return merge(left, right)

    complete: list[T | None] = []  # the largest nodes so far, from left to right
    for place, part in enumerate(parts):
        node, height = part, place
        while height & 1:  # a right child
            node, height = merged(complete.pop(), node), height >> 1
        complete.append(node)
    root = complete.pop() if complete else None
    while complete:
        root = merged(complete.pop(), root)
    return root


def prototype_of(reducer: Any) -> Reducer:
    """Return the reducer, or an instance created without arguments if a class is given.

    Raises:
        TypeError: If the reducer lacks a method.
    """
    prototype = reducer() if isinstance(reducer, type) else reducer
    missing = [name for name in ("add", "merge", "finish") if not callable(getattr(prototype, name, None))]
    if missing:
        raise TypeError(
            f"a reducer has add(result), merge(other) and finish(), and {prototype!r} lacks {', '.join(missing)}: "
            f"give tfr.WeightedMean(), tfr.Mean(), tfr.Sum() or an object of a class that has them"
        )
    ready: Reducer = prototype
    return ready
