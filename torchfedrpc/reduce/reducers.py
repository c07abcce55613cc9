"""Reducers: sums and means of a group's results, computed on the workers.

A reducer starts empty. `add` takes a client's result, `merge` takes the state of another reducer, `finish` returns
the value. Copies of a reducer are sent to the workers and return with partial results.

`torchfedrpc.reduce.numerics` describes precision, and the treatment of integers and booleans. A mean is within 4 ulp
of the exact one relative to the mean of the magnitudes, for any number of clients.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, Self

import numpy as np
import torch
from torch import Tensor
from torch.nn.parameter import Parameter

from torchfedrpc.reduce.numerics import added, kind_of, mean_from, sum_from, weighted
from torchfedrpc.wire.tensors import PlainTensors, check_can_travel

Key = str | int
Keys = Key | Sequence[Key]


class Reducer(Protocol):
    """Interface of a reducer. The reducer and its state must be picklable.

    ``merge`` runs on whichever process has both parts. For equal bits in all modes it must neither draw random
    numbers nor depend on torch's settings.
    """

    def add(self, result: Any, /) -> Any:
        """Add a client's result."""

    def merge(self, other: Any, /) -> Any:
        """Add the state of another reducer of this class, with results of clients that come later in order.

        The other reducer is not used again, so its memory may be reused.
        """

    def finish(self) -> Any:
        """Return the value. The reducer is not used again."""


@dataclass(slots=True)
class Entry:
    """Sum for one tensor, array or number of the value.

    Attributes:
        total: The sum, in the dtype that `torchfedrpc.reduce.numerics` specifies; for numbers a Python number.
        dtype: Dtype of the tensors or arrays; None for numbers.
        is_array: Whether the result is a numpy array.
        last: An entry that `settle` adds first, and the number of sums, as of `take`; None without one.
    """

    total: Any
    dtype: torch.dtype | None = None
    is_array: bool = False
    last: tuple[Entry, int] | None = None

    def __str__(self) -> str:
        if self.dtype is None:
            return "a number"
        name = str(self.dtype).removeprefix("torch.")
        form = "an array" if self.is_array else "a sparse tensor" if self.total.is_sparse else "a tensor"
        return f"{form} of {name} {list(self.total.shape)}"

    def matches(self, other: Entry) -> bool:
        """Return whether two entries can be added: numbers, or tensors of one shape and of dtypes of one kind."""
        if self.dtype is None or other.dtype is None:
            return self.dtype is other.dtype
        same_form = self.is_array == other.is_array and self.total.layout is other.total.layout
        same_shape: bool = self.total.shape == other.total.shape
        same_kind = self.dtype is other.dtype or kind_of(self.dtype) == kind_of(other.dtype)
        return same_form and same_shape and same_kind

    def take(self, other: Entry, num_sums: int) -> None:
        """Add the other entry's total and drop it there; entry by entry this bounds the memory in use.

        Args:
            other: An entry that matches.
            num_sums: Number of sums on the longest path to this one, inclusive.
        """
        total, mine = other.total, self.total
        other.total = self.total = None
        self.total = mine + total if self.dtype is None else added(mine, total, num_sums)


class BuiltinReducer:
    """Base class of the reducers of this library.

    The value of a client is a tensor, a numpy array, a number, or a nested structure of dicts, lists and tuples of
    those, such as a state dict or a dict of metrics. All clients must have the same keys, lengths, shapes and kinds
    of dtype (bool, integer, float, complex). The result has the structure and dtypes of the first client in order,
    with plain dicts, lists and tuples, plain tensors without gradient, and arrays. numpy's scalars count as numbers.

    `add` copies the tensors that it keeps, so learners may modify returned values afterwards.

    Args:
        value: The part of a result to reduce: a key of a mapping, an attribute of another object, or an index of a
            tuple or list. A tuple or list of these selects a dict of several parts. None: The whole result.
    """

    _exact: ClassVar[bool] = False

    def __init__(self, value: Keys | None = None) -> None:
        self.value = value
        # The value's structure with an Entry for each tensor, array and number; the sum of the weights; and the
        # number of sums on the longest path from a client's value to the entries.
        self._entries: Any = None
        self._weight: float = 0
        self._num_sums = 0

    def __repr__(self) -> str:
        return f"{type(self).__name__}(value={self.value!r})"

    @property
    def is_empty(self) -> bool:
        """Whether it has no results."""
        return self._entries is None

    def add(self, result: Any, /) -> None:
        """Add a client's result.

        Args:
            result: The result of one client.

        Raises:
            ValueError: If the result lacks a key, has an invalid weight, or does not match earlier results; nothing
                is added then.
            TypeError: If the result contains a value that cannot be summed.
        """
        weight = self._weigh(result)
        if weight == 0:
            return
        with PlainTensors():
            entries = begin(self._pick(result), weight, (self._root,), exact=self._exact)
            self._take(entries, weight, num_sums=0)

    def merge(self, other: Self, /) -> None:
        """Add the state of another reducer, and empty that one.

        Raises:
            ValueError: If the values do not match; nothing is added then.
        """
        with PlainTensors():
            self._take(other._entries, other._weight, other._num_sums)
        other._clear()

    def merge_last(self, other: Self, /) -> None:
        """Add the state of the last other reducer, before `finish`, which forms the sums one after another.

        A sum in float64 takes twice the memory of its parts; this way only one exists at a time.

        Raises:
            ValueError: As in `merge`.
        """
        for mine, theirs in self._matching(other._entries, other._weight, other._num_sums):
            mine.last = theirs, self._num_sums
        other._clear()

    def finish(self) -> Any:
        """Return the value, and empty the reducer.

        Raises:
            ValueError: If no result was added, or a sum of integers does not fit into their dtype.
        """
        entries, weight = self._entries, self._weight
        if entries is None:
            raise ValueError(f"{self!r}: {self._nothing()}")
        self._clear()
        with PlainTensors():
            return settle(entries, lambda entry: self._end(entry, weight), (self._root,))

    def _pick(self, result: Any) -> Any:
        if self.value is None:
            return result
        if isinstance(self.value, str | int):
            return pick(result, self.value)
        return {key: pick(result, key) for key in self.value}

    @property
    def _root(self) -> str:
        return repr(self.value) if isinstance(self.value, str | int) else "the result"

    def _take(self, entries: Any, weight: float, num_sums: int) -> None:
        for mine, other in self._matching(entries, weight, num_sums):
            mine.take(other, self._num_sums)

    def _matching(self, entries: Any, weight: float, num_sums: int) -> list[tuple[Entry, Entry]]:
        """Count entries in, and return the pairs to add."""
        matching: list[tuple[Entry, Entry]] = []
        if entries is None:
            return matching
        if self._entries is None:
            self._entries, self._num_sums = entries, num_sums
        else:
            pair(self._entries, entries, (self._root,), matching)
            self._num_sums = max(self._num_sums, num_sums) + 1
        self._weight += weight
        return matching

    def _clear(self) -> None:
        self._entries, self._weight, self._num_sums = None, 0, 0

    def _weigh(self, result: Any) -> float:
        return 1

    def _nothing(self) -> str:
        return "there is no value, since no result was added"

    def _end(self, entry: Entry, weight: float) -> Any:
        return entry.total / weight if entry.dtype is None else mean_from(entry.total, weight, entry.dtype)


class WeightedMean(BuiltinReducer):
    """Mean of the clients' values by their weights, as in FedAvg (McMahan et al. 2017).

    ``sum(weight * value) / sum(weight)``, in the dtypes of the values. For tensors and arrays of integers the result
    is the nearest integer, halves to even (so that BatchNorm's counters stay integers); for booleans it is true if
    values with more than half of the weight are. For numbers, ints included, the result is a float (or complex),
    since numbers are metrics rather than counters. The sum may overflow even if the mean would not, as sums in
    float32 do from 3.4e38 on.

    Args:
        value: The values to average; see `BuiltinReducer`.
        weight: Key of the weight in the result: a number, or a tensor or array of one number, finite and not
            negative, such as the count of samples. Ints stay exact. A client of weight 0 is not counted, and the
            rest of its result is ignored.
    """

    def __init__(self, value: Keys | None = "model_weights", weight: Key = "num_samples") -> None:
        super().__init__(value)
        self.weight = weight

    def __repr__(self) -> str:
        return f"WeightedMean(value={self.value!r}, weight={self.weight!r})"

    def _weigh(self, result: Any) -> float:
        return checked_weight(pick(result, self.weight), repr(self.weight))

    def _nothing(self) -> str:
        return f"there is no mean, since no result was added or every {self.weight!r} was 0"


class Mean(BuiltinReducer):
    """Mean of the clients' values with equal weights; integers and booleans are treated as in `WeightedMean`.

    Args:
        value: The values to average; see `BuiltinReducer`. None: The whole result, for a method that returns a loss
            or a dict of metrics.
    """


class Sum(BuiltinReducer):
    """Sum of the clients' values, in their dtypes.

    For tensors and arrays of integers the sum is exact, and an error if it does not fit into their dtype (sums of 64
    bits wrap). For booleans it is true if any value is, as with ``+`` of tensors and arrays. For numbers it is as
    exact as Python's: ints of any size; True counts as 1.

    Args:
        value: The values to sum; see `BuiltinReducer`. None: The whole result.
    """

    _exact = True

    def _end(self, entry: Entry, weight: float) -> Any:
        return entry.total if entry.dtype is None else sum_from(entry.total, entry.dtype)


def is_builtin(reducer: Reducer) -> bool:
    """Return whether a reducer is known to copy the results that it keeps, and to run no user code."""
    return type(reducer) in (WeightedMean, Mean, Sum)


def pick(result: Any, key: Key) -> Any:
    """Return the item of a result under a key, its attribute of that name, or its item at that index.

    Raises:
        ValueError: If there is no such key, attribute or index.
    """
    if isinstance(result, Mapping):
        if key in result:
            return result[key]
        known = ", ".join(map(repr, list(result)[:8])) or "nothing"
        raise ValueError(
            f"the learner's result has no {key!r}, only {known}: return it, or name another in the reducer"
        )
    if isinstance(key, int) and isinstance(result, list | tuple):
        if -len(result) <= key < len(result):
            return result[key]
        raise ValueError(f"the learner's result has {len(result)} items and none at {key}")
    if isinstance(key, str) and hasattr(result, key):
        return getattr(result, key)
    raise ValueError(
        f"the learner's result is a {type(result).__name__} without {key!r}: return a dict that has it, or name "
        f"another in the reducer"
    )


def checked_weight(weight: Any, name: str) -> float:
    """Return a weight as a Python number; ints stay ints.

    Raises:
        ValueError: If the weight is infinite, NaN, negative, or more than one number.
        TypeError: If the weight is not a real number.
    """
    if isinstance(weight, Tensor | np.ndarray | np.generic):
        size = weight.numel() if isinstance(weight, Tensor) else weight.size
        if size != 1:
            raise ValueError(f"{name} has {size} numbers, where a client's weight is one")
        weight = weight.item()
    if not isinstance(weight, int | float):
        raise TypeError(f"{name} is a {type(weight).__name__}, where a client's weight is a number")
    try:
        is_usable = math.isfinite(weight) and weight >= 0
    except OverflowError:  # an int beyond any float
        is_usable = False
    if not is_usable:
        raise ValueError(f"{name} is {weight}, where a client's weight is finite and not below 0")
    return weight


# Structures. A path is the name of the value, followed by keys.

Path = tuple[Any, ...]


def begin(value: Any, weight: float, path: Path, *, exact: bool) -> Any:
    """Return a client's value times its weight: its structure, with an `Entry` per tensor, array and number.

    Raises:
        TypeError: If a part is neither of these nor a dict, list or tuple.
    """
    if isinstance(value, Tensor):
        if type(value) not in (Tensor, Parameter):
            check_can_travel(value)
        if value.is_quantized or value.layout not in (torch.strided, torch.sparse_coo):
            kind = "quantised" if value.is_quantized else value.layout
            raise TypeError(f"{named(path)} is a {kind} tensor, and only dense and sparse_coo ones are added up")
        return Entry(weighted(value, weight, exact=exact), value.dtype)
    if isinstance(value, Mapping):
        return {key: begin(item, weight, (*path, key), exact=exact) for key, item in value.items()}
    if isinstance(value, list | tuple):
        items = [begin(item, weight, (*path, place), exact=exact) for place, item in enumerate(value)]
        return items if isinstance(value, list) else tuple(items)
    if isinstance(value, np.ndarray):
        tensor = _from_array(value, path)
        return Entry(weighted(tensor, weight, exact=exact), tensor.dtype, is_array=True)
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, int | float | complex):
        return Entry(weight * value)
    raise TypeError(
        f"{named(path)} is a {type(value).__name__}, which cannot be added up: tensors, arrays and numbers can, and "
        f"dicts, lists and tuples of them; the reducer's value=... names the part of the result to take"
    )


def pair(mine: Any, other: Any, path: Path, matching: list[tuple[Entry, Entry]]) -> None:
    """Append the pairs of corresponding entries of two structures to ``matching``.

    Raises:
        ValueError: If the structures do not match; the message names the key.
    """
    if isinstance(mine, Entry) and isinstance(other, Entry):
        if not mine.matches(other):
            raise ValueError(f"{named(path)} is {mine} in one result and {other} in another")
        matching.append((mine, other))
    elif type(mine) is not type(other):
        raise ValueError(f"{named(path)} is {_form(mine)} in one result and {_form(other)} in another")
    elif isinstance(mine, dict):
        if mine.keys() != other.keys():
            odd = [key for key in (*mine, *other) if key not in mine or key not in other]
            raise ValueError(f"{named(path)} has in one result only: {', '.join(map(repr, odd[:5]))}")
        for key, item in mine.items():
            pair(item, other[key], (*path, key), matching)
    else:
        if len(mine) != len(other):
            raise ValueError(f"{named(path)} has {len(mine)} items in one result and {len(other)} in another")
        for place, item in enumerate(mine):
            pair(item, other[place], (*path, place), matching)


def settle(entries: Any, end: Callable[[Entry], Any], path: Path) -> Any:
    """Return the structure with each entry replaced by its value; the entries are consumed.

    Raises:
        ValueError: If an entry has no value; the message names the key.
    """
    if isinstance(entries, dict):
        return {key: settle(item, end, (*path, key)) for key, item in entries.items()}
    if isinstance(entries, list | tuple):
        items = [settle(item, end, (*path, place)) for place, item in enumerate(entries)]
        return items if isinstance(entries, list) else tuple(items)
    memory = None
    if entries.last is not None:
        memory = entries.total
        entries.take(*entries.last)
    try:
        value = end(entries)
    except ValueError as error:
        raise ValueError(f"{named(path)} {error}") from None
    if value is not memory and isinstance(memory, Tensor) and memory.dtype == value.dtype and not memory.is_sparse:
        value = memory.copy_(value)  # else each wider sum leaves a hole in memory for its value
    entries.total = None
    return value.numpy() if entries.is_array else value


def named(path: Path) -> str:
    """Return a path in Python syntax, for messages."""
    root, *keys = path
    return f"{root}{''.join(f'[{key!r}]' for key in keys)}"


def _form(structure: Any) -> str:
    return str(structure) if isinstance(structure, Entry) else f"a {type(structure).__name__}"


def _from_array(array: np.ndarray, path: Path) -> Tensor:
    """Return the array as a tensor, which may share its memory."""
    try:
        return torch.from_numpy(np.require(array, array.dtype.newbyteorder("="), ["C", "A", "W", "E"]))
    except TypeError:
        raise TypeError(f"{named(path)} is an array of {array.dtype}, which cannot be added up") from None
