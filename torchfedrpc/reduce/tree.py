"""The fixed tree by which the results of a group are added up, whichever workers have them.

Clients have places, 0 to n - 1. Node ``(level, index)`` covers the places from ``index * 2**level`` to before
``(index + 1) * 2**level``, and its value depends on the values of its two children alone. So the bits of the root do
not depend on who formed which node, nor in which order: a client that takes no part, or fails, leaves its node empty,
and where one child is empty the other one's value passes up as it is.
"""

from __future__ import annotations

import copy
import threading
from bisect import bisect_left
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

from torchfedrpc.reduce.reducers import Reducer

Node = tuple[int, int, Reducer, tuple[int, ...]]
"""Level, index, the reducer that has taken the results of this node's clients, and the places of those clients."""

T = TypeVar("T")

_WAITING, _COUNTED, _SKIPPED = range(3)
_PUT_DOWN = object()


class MergeError(Exception):
    """Two partial results do not go together; the reason is the ``__cause__``.

    All clients within either went together, so what holds for one client of each holds for the two parts.

    Attributes:
        places: the first client's place on the left and on the right side.
        reason: the error of ``merge``.
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
    """The nodes of one tree that are in this process: on a worker those of its clients, on the driver all in the end.

    A node is formed as soon as its two children are complete: each of their clients was added or skipped. A forest
    whose clients are neighbours and complete in order so holds no more than about log2 of their number of reducers.

    Thread-safe. The lock guards only which nodes are here: a reducer belongs to one thread while something is added
    to it, so reducers are filled and merged outside of the lock, and those of different nodes at once.

    Args:
        prototype: an empty reducer, of which every client's is a deep copy.
        places: those of all clients of the run that take part, ascending. Any numbers will do, as long as all forests
            of a run have the same.

    Raises:
        ValueError: the places are not ascending, or below 0.
    """

    def __init__(self, prototype: Reducer, places: Iterable[int]) -> None:
        self._prototype = prototype
        self._places = tuple(places)
        if any(left >= right for left, right in zip((-1, *self._places), self._places, strict=False)):
            raise ValueError("places must be ascending numbers from 0 on")
        self._height = self._places[-1].bit_length() if self._places else 0
        self._states = bytearray(len(self._places))  # by rank among the places
        self._nodes: dict[tuple[int, int], Reducer | None] = {}  # complete ones; None has no client that counts
        self._num_climbing = 0  # threads that have a node in their hands
        self._error: MergeError | None = None
        self._changed = threading.Condition()  # its lock guards the four above

    def __len__(self) -> int:
        """How many reducers it holds."""
        with self._changed:
            return sum(reducer is not None for reducer in self._nodes.values())

    def waiting(self) -> list[int]:
        """The places that were neither added, skipped nor put here."""
        with self._changed:
            return self._with_state(0, len(self._places), _WAITING)

    def add(self, place: int, result: Any) -> None:
        """Take a client's result, and merge what it completes.

        Args:
            place: the client's.
            result: of its call.

        Raises:
            MergeError: two parts do not go together; the forest is of no use any more, and says so at each step.
            ValueError: the place takes no part, or is added or skipped already.
            Exception: what the reducer's ``add`` raised; the place goes on waiting.
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
        """Note that a client counts for nothing, where it is not known yet; what that completes is merged.

        Raises:
            MergeError: as of `add`.
            ValueError: the place takes no part, or is counted.
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
        """The largest complete nodes that count a client, from left to right; then the forest is empty and waits
        anew for all places but those that were skipped.

        Threads that are merging are waited for. A client whose `add` has not returned may be part of it or of the
        next.

        Raises:
            MergeError: as of `add`.
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
            for place in skipped:  # a result that comes late must not come with the next nodes
                self.skip(place)
        return sorted(nodes, key=lambda node: node[3])

    def put(self, level: int, index: int, reducer: Reducer, places: Sequence[int]) -> None:
        """Take a node that another forest of the same places gave, and merge what it completes.

        Those of the node's clients that are not among ``places`` are skipped.

        Raises:
            MergeError: as of `add`.
            ValueError: it is no node of this tree, counts a client that is skipped or counted here, or counts none.
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
        """The value of the whole tree, and how many clients count; the forest is empty then.

        Raises:
            MergeError: as of `add`.
            ValueError: a place is still waiting, or no client counts.
            Exception: what the reducer's ``finish`` raised.
        """
        if waiting := self.waiting():
            raise ValueError(f"{len(waiting)} clients are neither added nor skipped, such as that at {waiting[0]}")
        nodes = self.take()
        if not nodes:
            raise ValueError("there is nothing to reduce: no client counts")
        [(_, _, reducer, places)] = nodes
        return reducer.finish(), len(places)

    def _climb(self, level: int, index: int, reducer: Reducer | None) -> None:
        """Merge a node that is complete with its sibling, that with its own, and so on; then put it down."""
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
        """The sibling's reducer where the sibling is complete, else `_PUT_DOWN`, and the node is among the nodes."""
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
        """A node of its children."""
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

    # The lock is held for what reads states.

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
        """The ranks of the places that a node covers: from the first to before the second."""
        first = bisect_left(self._places, index << level)
        return first, bisect_left(self._places, (index + 1) << level, lo=first)


def fold(parts: Iterable[T | None], merge: Callable[[T, T], T]) -> T | None:
    """The value of the same tree over what is at hand, each part asked for when it is due.

    About log2 of their number are held at once.

    Args:
        parts: what is at place 0, 1 and so on; None counts for nothing.
        merge: gives a node's value from those of its left and its right child, which it may use up.

    Returns:
        The root's value; None where nothing counts.
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
    """The reducer itself, or one made without arguments where it is a class.

    Raises:
        TypeError: it lacks one of the methods.
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
