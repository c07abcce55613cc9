"""Reducers: what a group's results come to, formed where the learners are.

A reducer begins empty. `add` takes a client's result, `merge` takes what another reducer has taken, `finish` gives
the value. Copies of one are sent to the workers, and come back with what they have taken.

How exact, and what becomes of integers and booleans: `torchfedrpc.reduce.numerics`. A mean is within 4 ulp of the
exact one relative to the mean of the magnitudes, however many clients there are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, Self

import numpy as np
import torch
from torch import Tensor
from torch.nn.parameter import Parameter

from torchfedrpc.reduce.numerics import added, kind_of, mean_from, sum_from, weighted
from torchfedrpc.wire.tensors import PlainTensors, check_can_travel

_SMALL_BYTES = 1 << 20

Key = str | int
Keys = Key | Sequence[Key]


class Reducer(Protocol):
    """What a reducer has to have; it and what it has taken must pickle."""

    def add(self, result: Any, /) -> Any:
        """Take a client's result."""

    def merge(self, other: Any, /) -> Any:
        """Take what another reducer of this class has taken: of clients that come after one's own, in order.

        The other one is not used again, so its memory may be kept.
        """

    def finish(self) -> Any:
        """The value; nothing is asked of the reducer afterwards."""


@dataclass(slots=True)
class Entry:
    """What has been added up for one tensor, array or number of the value.

    Attributes:
        total: in the dtype that `torchfedrpc.reduce.numerics` gives; of numbers in Python's own.
        dtype: that of the tensors or arrays; None for numbers.
        is_array: whether it becomes a numpy array.
    """

    total: Any
    dtype: torch.dtype | None = None
    is_array: bool = False

    def __str__(self) -> str:
        if self.dtype is None:
            return "a number"
        name = str(self.dtype).removeprefix("torch.")
        form = "an array" if self.is_array else "a sparse tensor" if self.total.is_sparse else "a tensor"
        return f"{form} of {name} {list(self.total.shape)}"

    def matches(self, other: Entry) -> bool:
        """Whether the two can be added: numbers, or tensors of one shape and of dtypes of one kind."""
        if self.dtype is None or other.dtype is None:
            return self.dtype is other.dtype
        same_form = self.is_array == other.is_array and self.total.layout is other.total.layout
        same_shape: bool = self.total.shape == other.total.shape
        return same_form and same_shape and kind_of(self.dtype) == kind_of(other.dtype)

    def take(self, other: Entry, num_sums: int) -> None:
        """Add the other one's total, which that has no more then: one by one they need no memory together.

        Args:
            other: one that matches.
            num_sums: how many sums are on the longest way to here, this one included.
        """
        total, mine = other.total, self.total
        other.total = self.total = None
        self.total = mine + total if self.dtype is None else added(mine, total, num_sums)


class BuiltinReducer:
    """The base of the reducers of this library.

    The value of a client is a tensor, a numpy array, a number, or dicts, lists and tuples of those, nested as one
    likes: a state dict, a dict of metrics. All clients have the same keys, lengths and shapes, and the same kinds
    of dtype (bool, integer, float, complex); the result has the structure and the dtypes of the client that comes
    first in order, with plain dicts, lists and tuples, plain tensors without gradient, and arrays. numpy's scalars
    count as numbers.

    `add` copies what it keeps and does not own, so learners may go on changing what they returned.

    Args:
        value: what to take of a result: a key where it is a mapping, an attribute of another object, or an index of
            a tuple or list. Several of these, as a tuple or list, make a dict of what they name. None takes the
            result as a whole.
    """

    _exact: ClassVar[bool] = False

    def __init__(self, value: Keys | None = None) -> None:
        self.value = value
        # The value's structure with an Entry for each tensor, array and number; the sum of the weights; and how many
        # sums are on the longest way from a client's value to the entries.
        self._entries: Any = None
        self._weight: float = 0
        self._num_sums = 0

    def __repr__(self) -> str:
        return f"{type(self).__name__}(value={self.value!r})"

    def add(self, result: Any, /) -> None:
        """Take a client's result.

        Args:
            result: of one client.

        Raises:
            ValueError: it lacks a key or has an unusable weight, or does not match what was added before; then
                nothing was taken.
            TypeError: it holds something that cannot be added up.
        """
        weight = self._weigh(result)
        if weight == 0:
            return
        with PlainTensors():
            entries = begin(self._pick(result), weight, (self._root,), exact=self._exact)
            self._take(entries, weight, num_sums=0)

    def merge(self, other: Self, /) -> None:
        """Take what the other one has taken, and leave it empty.

        Raises:
            ValueError: the values do not match; then nothing was taken.
        """
        with PlainTensors():
            self._take(other._entries, other._weight, other._num_sums)
        other._clear()

    def finish(self) -> Any:
        """The value, and leave the reducer empty.

        Raises:
            ValueError: nothing was added, or a sum of integers does not fit into their dtype.
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
        if entries is None:
            return
        if self._entries is None:
            self._entries, self._num_sums = entries, num_sums
        else:
            matching = list(pairs(self._entries, entries, (self._root,)))
            self._num_sums = max(self._num_sums, num_sums) + 1
            for mine, other in matching:
                mine.take(other, self._num_sums)
        self._weight += weight

    def _clear(self) -> None:
        self._entries, self._weight, self._num_sums = None, 0, 0

    def _weigh(self, result: Any) -> float:
        return 1

    def _nothing(self) -> str:
        return "there is no value, since no result was added"

    def _end(self, entry: Entry, weight: float) -> Any:
        return entry.total / weight if entry.dtype is None else mean_from(entry.total, weight, entry.dtype)


class WeightedMean(BuiltinReducer):
    """The mean of the clients' values by their weights, as in FedAvg (McMahan et al. 2017).

    ``sum(weight * value) / sum(weight)``, in the dtypes of the values. Of tensors and arrays of integers it is the
    nearest integer, halves to even (BatchNorm's counters stay what they are), and of booleans true where more than
    half of the weight says so. Of numbers, ints too, it is a float (or complex), since they are metrics rather than
    counters. The sum may overflow where the mean would not, as sums in float32 do from 3.4e38 on.

    Args:
        value: what to average; see `BuiltinReducer`.
        weight: where the result has its weight: a number, or a tensor or array of one, finite and not negative, such
            as the count of samples. Ints stay exact. A client of weight 0 does not count, and nothing else of its
            result is looked at.
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
    """The mean of the clients' values, all counting alike; integers and booleans as `WeightedMean` has them.

    Args:
        value: what to average; see `BuiltinReducer`. None: the result as a whole, as of a method that returns a loss
            or a dict of metrics.
    """


class Sum(BuiltinReducer):
    """The sum of the clients' values, in their dtypes.

    Of tensors and arrays of integers it is exact, and an error where it does not fit into their dtype (those of 64
    bits wrap); of booleans it is true where any is, as ``+`` has it for tensors and arrays. Of numbers it is as exact
    as Python's: ints of any size, True counting 1.

    Args:
        value: what to add up; see `BuiltinReducer`. None: the result as a whole.
    """

    _exact = True

    def _end(self, entry: Entry, weight: float) -> Any:
        return entry.total if entry.dtype is None else sum_from(entry.total, entry.dtype)


def is_builtin(reducer: Reducer) -> bool:
    """Whether it is known to copy what it adds and does not own, and to run no code of the user's."""
    return type(reducer) in (WeightedMean, Mean, Sum)


def are_small(reducers: Iterable[Reducer]) -> bool:
    """Whether to merge and finish them takes less than to have a thread do it; a user's class may take any time."""
    num_bytes = 0
    for reducer in reducers:
        if not is_builtin(reducer):
            return False
        num_bytes += _num_bytes(reducer._entries)  # type: ignore[attr-defined]
    return num_bytes <= _SMALL_BYTES


def _num_bytes(entries: Any) -> int:
    if isinstance(entries, dict | list | tuple):
        return sum(map(_num_bytes, entries.values() if isinstance(entries, dict) else entries))
    total = entries.total if isinstance(entries, Entry) else None
    if not isinstance(total, Tensor):
        return 0
    return total._values().nbytes + total._indices().nbytes if total.is_sparse else total.nbytes


def pick(result: Any, key: Key) -> Any:
    """What a result has under a key, as an attribute of that name, or at that index.

    Raises:
        ValueError: it has nothing of that name.
    """
    if isinstance(result, Mapping):
        if key in result:
            return result[key]
        known = ", ".join(map(repr, list(result)[:8])) or "nothing"
        raise ValueError(f"the result has no {key!r}, only {known}: return it, or give the reducer another name")
    if isinstance(key, int) and isinstance(result, list | tuple):
        if -len(result) <= key < len(result):
            return result[key]
        raise ValueError(f"the result has {len(result)} items and none at {key}")
    if isinstance(key, str) and hasattr(result, key):
        return getattr(result, key)
    raise ValueError(
        f"the result is a {type(result).__name__} without {key!r}: return a dict that has it, or give the reducer "
        f"another name"
    )


def checked_weight(weight: Any, name: str) -> float:
    """A weight as a Python number, ints as they are.

    Raises:
        ValueError: it is infinite, NaN, negative, or more than one number.
        TypeError: it is no real number.
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


# Of structures. A path is the value's name and the keys that lead on.

Path = tuple[Any, ...]


def begin(value: Any, weight: float, path: Path, *, exact: bool) -> Any:
    """A client's value times its weight: its structure, with an `Entry` for each tensor, array and number.

    Raises:
        TypeError: something is neither these nor a dict, list or tuple.
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


def pairs(mine: Any, other: Any, path: Path) -> Iterator[tuple[Entry, Entry]]:
    """The entries of two structures that belong together.

    Raises:
        ValueError: the structures do not match; the message names the key.
    """
    if isinstance(mine, Entry) and isinstance(other, Entry):
        if not mine.matches(other):
            raise ValueError(f"{named(path)} is {mine} in one result and {other} in another")
        yield mine, other
    elif type(mine) is not type(other):
        raise ValueError(f"{named(path)} is {_form(mine)} in one result and {_form(other)} in another")
    elif isinstance(mine, dict):
        if mine.keys() != other.keys():
            odd = [key for key in (*mine, *other) if key not in mine or key not in other]
            raise ValueError(f"{named(path)} has in one result only: {', '.join(map(repr, odd[:5]))}")
        for key, item in mine.items():
            yield from pairs(item, other[key], (*path, key))
    else:
        if len(mine) != len(other):
            raise ValueError(f"{named(path)} has {len(mine)} items in one result and {len(other)} in another")
        for place, item in enumerate(mine):
            yield from pairs(item, other[place], (*path, place))


def settle(entries: Any, end: Callable[[Entry], Any], path: Path) -> Any:
    """The structure with each entry's value in its place; its entries are used up.

    Raises:
        ValueError: an entry has none; the message names the key.
    """
    if isinstance(entries, dict):
        return {key: settle(item, end, (*path, key)) for key, item in entries.items()}
    if isinstance(entries, list | tuple):
        items = [settle(item, end, (*path, place)) for place, item in enumerate(entries)]
        return items if isinstance(entries, list) else tuple(items)
    try:
        value = end(entries)
    except ValueError as error:
        raise ValueError(f"{named(path)} {error}") from None
    entries.total = None
    return value.numpy() if entries.is_array else value


def named(path: Path) -> str:
    """A path as code has it, for messages."""
    root, *keys = path
    return f"{root}{''.join(f'[{key!r}]' for key in keys)}"


def _form(structure: Any) -> str:
    return str(structure) if isinstance(structure, Entry) else f"a {type(structure).__name__}"


def _from_array(array: np.ndarray, path: Path) -> Tensor:
    """The array as a tensor, which may alias it."""
    try:
        return torch.from_numpy(np.require(array, array.dtype.newbyteorder("="), ["C", "A", "W", "E"]))
    except TypeError:
        raise TypeError(f"{named(path)} is an array of {array.dtype}, which cannot be added up") from None
