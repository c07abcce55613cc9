"""Fixed binary tree in which the results of a group are merged, independent of their placement on workers.

Clients have places, 0 to n - 1. Node ``(level, index)`` covers the places from ``index * 2**level`` to
``(index + 1) * 2**level - 1``, and its value depends only on the values of its two children. So the bits of the root
depend neither on the process that computes a node nor on the order of computation. A client without a result leaves
its node empty. If one child is empty, the node takes the value of the other child.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Container, Iterable
from typing import Any, TypeVar

from torchfedrpc.reduce.reducers import BuiltinReducer, Reducer, is_builtin

Node = tuple[int, int, Reducer]
"""Level, index, and the reducer with the results of all clients of this node."""

T = TypeVar("T")


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

    def is_between(self, places: Container[int]) -> bool:
        """Return whether it is of two clients among these, as one from another process need not be."""
        match vars(self):
            case {"places": (int(left), int(right)), "reason": BaseException()}:
                return left in places and right in places
        return False

    def __str__(self) -> str:
        return (
            f"the results of the clients at {self.places[0]} and {self.places[1]} do not go together: {self.reason}"
        )


class Forest:
    """The nodes of one tree that the results in this process complete.

    Two nodes are merged as soon as all their clients have been added. So a forest of neighbouring clients that are
    added in order holds at most about log2 of their number of reducers.

    Thread-safe. The lock guards only the table of nodes. A reducer belongs to one thread while it is modified, so
    reducers are filled and merged outside the lock, those of different nodes in parallel.

    Args:
        prototype: An empty reducer; each client's reducer is a deep copy.
        num_places: Number of clients of the reduction, in all processes.
    """

    def __init__(self, prototype: Reducer, num_places: int) -> None:
        self._prototype = prototype
        # A user's reducer may keep sums in containers; an empty one of ours has nothing to share.
        has_none = isinstance(prototype, BuiltinReducer) and is_builtin(prototype) and prototype.is_empty
        self._copy: Callable[[Reducer], Reducer] = copy.copy if has_none else copy.deepcopy
        self._num_places = num_places
        self._added: set[int] = set()
        self._nodes: dict[tuple[int, int], Reducer] = {}
        self._num_climbing = 0  # number of threads that are merging a node
        self._error: MergeError | None = None
        self._changed = threading.Condition()  # its lock guards the four attributes above

    def __len__(self) -> int:
        """Return the number of reducers that the forest holds."""
        with self._changed:
            return len(self._nodes)

    def add(self, place: int, result: Any) -> None:
        """Add a client's result, and merge the nodes that it completes.

        Args:
            place: The client's place.
            result: The result of its call.

        Raises:
            MergeError: If two parts cannot be merged. The forest is unusable then, and every later step raises it.
            ValueError: If the client was added before.
            Exception: If the reducer's ``add`` raised it; the client may be added later.
        """
        reducer = self._copy(self._prototype)
        reducer.add(result)
        with self._changed:
            self._check_usable()
            if place in self._added:
                raise ValueError(f"the client at {place} was added before")
            self._added.add(place)
            self._num_climbing += 1
        try:
            self._climb(0, place, reducer)
        finally:
            with self._changed:
                self._num_climbing -= 1
                self._changed.notify_all()

    def take(self) -> list[Node]:
        """Return the largest complete nodes, from left to right, and empty the forest.

        This waits for threads that are merging. The result of a concurrent `add` is in these nodes or in the next
        ones.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._num_climbing == 0)
            self._check_usable()
            nodes = [(level, index, reducer) for (level, index), reducer in self._nodes.items()]
            self._nodes.clear()
            self._added.clear()
        return sorted(nodes, key=lambda node: node[1] << node[0])

    def _climb(self, level: int, index: int, reducer: Reducer) -> None:
        """Merge a complete node with its sibling, and so on up the tree, then store the last node."""
        while True:
            with self._changed:
                sibling = self._nodes.pop((level, index ^ 1), None)
                is_root = 1 << level >= self._num_places
                if sibling is None and (is_root or (index ^ 1) << level < self._num_places):
                    self._nodes[level, index] = reducer
                    return
            if sibling is not None:
                left, right = (sibling, reducer) if index & 1 else (reducer, sibling)
                reducer = self._merged(level, index & ~1, left, right)
            level, index = level + 1, index >> 1

    def _merged(self, level: int, index: int, left: Reducer, right: Reducer) -> Reducer:
        """Merge the node at an index, and its right sibling."""
        try:
            left.merge(right)
        except BaseException as reason:
            with self._changed:
                self._error = MergeError((index << level, (index + 1) << level), reason)
                self._nodes.clear()
                if isinstance(reason, Exception):
                    raise self._error from reason
            raise
        return left

    def _check_usable(self) -> None:
        if self._error is not None:
            raise MergeError(self._error.places, self._error.reason) from self._error.reason


def covered(level: int, index: int, num_places: int) -> range:
    """Return the places of a node, none if it is not a node of the tree."""
    if not (0 <= level <= (num_places - 1).bit_length() and index >= 0):
        return range(0)
    return range(index << level, min((index + 1) << level, num_places))


def merged(nodes: Iterable[Node], num_places: int) -> Reducer:
    """Merge nodes of one tree, which are consumed, and return the reducer of the root, to be finished at once.

    Args:
        nodes: At least one; no two cover the same client. Clients that none covers have no result.
        num_places: Number of clients of the reduction.

    Raises:
        MergeError: If two nodes cannot be merged.
    """
    parts = {(level, index): (index << level, reducer) for level, index, reducer in nodes}
    for level in range((num_places - 1).bit_length()):
        for index in sorted([index for height, index in parts if height == level]):
            place, right = parts.pop((level, index))
            above = level + 1, index >> 1
            if above not in parts:  # the other child has no result, or comes next
                parts[above] = place, right
                continue
            first, left = parts[above]
            merge = left.merge
            if len(parts) == 1 and is_builtin(left):
                merge = left.merge_last  # type: ignore[attr-defined]
            try:
                merge(right)
            except Exception as reason:
                raise MergeError((first, place), reason) from reason
    [(_, root)] = parts.values()
    return root


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
