"""Kinds whose state is in Python's containers: order, identity, and classes derived from them."""

from __future__ import annotations

import collections
import itertools
import types
import weakref
from typing import Any

from corpus.bits import bits
from corpus.registry import kind


@kind()
class OrderedReordered:
    """An OrderedDict that calls reorder."""

    def __init__(self, client_id: str) -> None:
        self.cache = collections.OrderedDict((name, 0) for name in "abc")

    def step(self) -> str:
        self.cache.move_to_end(next(iter(self.cache)))
        return bits(list(self.cache))


@kind()
class DictReordered:
    """A dict whose entries were deleted and added again."""

    def __init__(self, client_id: str) -> None:
        self.scores = dict.fromkeys(range(5), 0)

    def step(self) -> str:
        first = next(iter(self.scores))
        self.scores[first] = self.scores.pop(first) + 1
        return bits(self.scores)


@kind()
class DefaultByType:
    """A defaultdict with a type as factory."""

    def __init__(self, client_id: str) -> None:
        self.lists: Any = collections.defaultdict(list)

    def step(self) -> str:
        self.lists[len(self.lists)].append(1)
        return bits(dict(self.lists), self.lists["new"])


@kind(refused="'lists'")
class DefaultByLambda:
    """A defaultdict with a lambda as factory."""

    def __init__(self, client_id: str) -> None:
        self.lists: Any = collections.defaultdict(lambda: [1])

    def step(self) -> str:
        self.lists[len(self.lists)].append(1)
        return bits(dict(self.lists))


@kind()
class Counters:
    """Counter, bounded deque, and ChainMap."""

    def __init__(self, client_id: str) -> None:
        self.counter: Any = collections.Counter("abca")
        self.recent: Any = collections.deque(maxlen=2)
        self.chain = collections.ChainMap({}, {"a": 1})

    def step(self) -> str:
        self.counter.update("bd")
        self.recent.append(len(self.counter))
        self.chain["a"] = self.chain["a"] + 1
        return bits(self.counter.most_common(), list(self.recent), self.recent.maxlen, self.chain.maps)


@kind()
class UserContainers:
    """UserDict and UserList."""

    def __init__(self, client_id: str) -> None:
        self.d, self.items = collections.UserDict(a=1), collections.UserList([1])

    def step(self) -> str:
        self.d["a"] += 1
        self.items.append(self.d["a"])
        return bits(self.d.data, self.items.data)


class Doubling(dict[Any, Any]):
    """A dict that doubles what is put into it."""

    def __setitem__(self, key: Any, value: Any) -> None:
        super().__setitem__(key, 2 * value)


@kind()
class DictSubclass:
    """A dict subclass with a `__setitem__` of its own."""

    def __init__(self, client_id: str) -> None:
        self.d = Doubling(a=1)
        self.d["b"] = 1

    def step(self) -> str:
        self.d["b"] = self.d["a"] + 1
        return bits(dict(self.d))


class Logging(list[Any]):
    """A list that counts what is added."""

    count = 0

    def append(self, value: Any) -> None:
        self.count += 1
        super().append((self.count, value))

    def extend(self, values: Any) -> None:
        for value in values:
            self.append(value)


@kind()
class ListSubclass:
    """A list subclass with `append` and `extend` of its own."""

    def __init__(self, client_id: str) -> None:
        self.log = Logging()

    def step(self) -> str:
        self.log.append("x")
        return bits(list(self.log), self.log.count)


class Unique(set[Any]):
    """A set with an attribute."""

    label = "none"


@kind()
class OtherSubclasses:
    """Subclasses of set, tuple, str, int, float and deque, with attributes."""

    def __init__(self, client_id: str) -> None:
        self.s = Unique([3, 1])
        self.s.label = client_id
        self.n, self.x, self.text, self.pair = Count(1), Metres(0.5), Name("a"), Pair((1, [2]))
        self.n.unit = "m"
        self.queue = Queue([1, 2])
        self.queue.seen = 0

    def step(self) -> str:
        self.s.add(len(self.s))
        self.pair[1].append(1)
        self.queue.seen += 1
        self.queue.append(self.queue.seen)
        return bits(sorted(self.s), self.s.label, self.n, self.n.unit, self.x, self.text, self.pair, list(self.queue))


class Count(int):
    """A number with a unit."""

    unit = "none"


class Metres(float):
    """A length."""


class Name(str):
    """A name."""

    __slots__ = ()


class Pair(tuple[Any, Any]):
    """A pair."""


class Queue(collections.deque[Any]):
    """A queue with a counter."""

    seen = 0


@kind(refused="'ids'")
class SetShrunk:
    """A set of numbers that has shrunk, whose order tells how large it was."""

    def __init__(self, client_id: str) -> None:
        self.ids = set(range(0, 40_000, 17))
        for number in range(0, 40_000, 17):
            if number % 1000 > 34:
                self.ids.discard(number)

    def step(self) -> str:
        order = list(self.ids)
        self.ids.discard(order[0])
        self.ids.add(order[-1] + 1)
        return bits(order)


@kind(documented="the order of a set of strings depends on the process's hash seed")
class SetOfStrings:
    """The order of a set of strings."""

    def __init__(self, client_id: str) -> None:
        self.names = {f"layer.{number}" for number in range(20)}

    def step(self) -> str:
        self.names.add(f"more.{len(self.names)}")
        return bits(list(self.names))


@kind(refused="'counts'")
class NanKeys:
    """A dict with NaN as key, found by identity."""

    def __init__(self, client_id: str) -> None:
        self.nan = float("nan")
        self.counts = {self.nan: 0}

    def step(self) -> str:
        self.counts[self.nan] = self.counts.get(self.nan, 0) + 1
        return bits(list(self.counts.values()))


@kind(refused="'counts'")
class NanOfMath:
    """NaN of the math module as key, a constant of the process."""

    def __init__(self, client_id: str) -> None:
        import math

        self.counts = {math.nan: 0}

    def step(self) -> str:
        import math

        self.counts[math.nan] = self.counts.get(math.nan, 0) + 1
        return bits(list(self.counts.values()))


@kind(documented="an object's id is another in each process")
class KeyedById:
    """A dict keyed by the `id()` of objects."""

    def __init__(self, client_id: str) -> None:
        self.parts = [[0], [1]]
        self.counts = {id(part): 0 for part in self.parts}

    def step(self) -> str:
        for part in self.parts:
            self.counts[id(part)] = self.counts.get(id(part), 0) + 1
        return bits(list(self.counts.values()))


class Part:
    """A part of a learner that knows the learner."""

    def __init__(self, owner: Any) -> None:
        self.owner = owner
        self.count = 0


@kind(refused="'me'")
class RefersToItself:
    """A learner that refers to itself."""

    def __init__(self, client_id: str) -> None:
        self.me = self
        self.count = 0

    def step(self) -> str:
        self.me.count += 1
        return bits(self.count)


@kind(refused="'parts'")
class PartsReferToIt:
    """A learner whose parts refer to it."""

    def __init__(self, client_id: str) -> None:
        self.count = 0
        self.parts = [Part(self), Part(self)]

    def step(self) -> str:
        for part in self.parts:
            part.owner.count += 1
        return bits(self.count)


@kind()
class Cycles:
    """A list that contains itself, and a tree whose nodes know their parents."""

    def __init__(self, client_id: str) -> None:
        self.ring: list[Any] = [0]
        self.ring.append(self.ring)
        self.root = types.SimpleNamespace(count=0, children=[])
        self.root.children.append(types.SimpleNamespace(parent=self.root))

    def step(self) -> str:
        self.ring[1][1][0] += 1
        self.root.children[0].parent.count += 1
        return bits(self.ring[0], self.root.count)


@kind()
class SharedParts:
    """Two attributes, and an entry of a third, that are one list."""

    def __init__(self, client_id: str) -> None:
        self.a: list[int] = []
        self.b, self.c = self.a, {"a": self.a}

    def step(self) -> str:
        self.a.append(len(self.b))
        return bits(self.b, self.c)


@kind(refused="'keys'")
class DictViews:
    """A view of a dict's keys."""

    def __init__(self, client_id: str) -> None:
        self.d = {"a": 1}
        self.keys = self.d.keys()

    def step(self) -> str:
        self.d[f"b{len(self.d)}"] = 1
        return bits(list(self.keys))


@kind(refused="'proxy'")
class MappingProxy:
    """A read-only view of a dict."""

    def __init__(self, client_id: str) -> None:
        self.d = {"a": 1}
        self.proxy = types.MappingProxyType(self.d)

    def step(self) -> str:
        self.d["a"] += 1
        return bits(dict(self.proxy))


@kind(refused="'ref'")
class WeakReference:
    """A weak reference to a part."""

    def __init__(self, client_id: str) -> None:
        self.part = Part(None)
        self.ref = weakref.ref(self.part)

    def step(self) -> str:
        self.ref().count += 1
        return bits(self.part.count)


@kind(refused="'seen'")
class WeakKeys:
    """A WeakKeyDictionary of parts."""

    def __init__(self, client_id: str) -> None:
        self.part = Part(None)
        self.seen: Any = weakref.WeakKeyDictionary({self.part: 0})

    def step(self) -> str:
        self.seen[self.part] += 1
        return bits(self.seen[self.part], len(self.seen))


@kind(refused="'iterator'")
class IteratorOfList:
    """An iterator over a list, part of the way."""

    def __init__(self, client_id: str) -> None:
        self.items = list("abcd")
        self.iterator = iter(self.items)

    def step(self) -> str:
        self.items.append("e")
        return bits(next(self.iterator), self.iterator.__length_hint__())


@kind(refused="'numbers'")
class IteratorsOfItertools:
    """`itertools.count`, `cycle` of a list, and a range's iterator."""

    def __init__(self, client_id: str) -> None:
        self.numbers, self.turns = itertools.count(5), itertools.cycle("ab")
        self.steps = iter(range(10))

    def step(self) -> str:
        return bits(next(self.numbers), next(self.turns), next(self.steps))


@kind(refused="'batches'")
class GeneratorKept:
    """A generator, part of the way."""

    def __init__(self, client_id: str) -> None:
        self.batches = (number * number for number in range(10))

    def step(self) -> str:
        return bits(next(self.batches))
